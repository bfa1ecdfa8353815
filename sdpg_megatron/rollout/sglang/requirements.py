"""Check that a server fits the run: its model, context length and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.errors import ConfigError, RolloutError
from sdpg_megatron.rollout.sglang.client import Client

RESERVED = 4
"""Tokens of prompt and response beyond a server's ``max_req_input_len``.

That is the smaller of context and KV cache, less 6; prompt and response together may have 2 less. SGLang silently cuts
longer responses.
Source: sglang.srt.managers.tp_worker and scheduler (init_req_max_new_tokens) of SGLang 0.5.23.
"""

NEUTRAL_SAMPLING: Mapping[str, object] = {
    "speculative_accept_threshold_single": 1.0,
    "speculative_accept_threshold_acc": 1.0,
    "watermark_default_enabled": False,
    "watermark_enforce_all": False,
}
"""Server arguments that change the sampling at other values. Source: sglang.srt.arg_groups of SGLang 0.5.23."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRequirements:
    """Requirements on every server of a run."""

    architecture: Architecture
    prompt_tokens: int
    response_tokens: int
    memory_saver: bool
    """The server must be able to release its memory."""

    async def check(self, client: Client) -> None:
        """Raises `RolloutError` naming the mismatch, or `ServerError` if the server does not answer."""
        model, server = await client.model_info(), await client.server_info()
        for found in (self._model(model, server), self._room(server), _sampling(model, server), self._memory(server)):
            if found is not None:
                raise RolloutError(f"{client.url}: {found}")

    def _model(self, model: Mapping[str, Any], server: Mapping[str, Any]) -> str | None:
        family, path = model.get("model_type"), Path(str(server.get("model_path")))
        fix = "Fix: start it with --model-path model.path"
        if family != self.architecture.family:
            return f"it serves a {family} model ({path}); the run trains a {self.architecture.family}. {fix}"
        if not (path / "config.json").exists():
            return None  # on another machine: the first publish shows wrong shapes
        try:
            served = read_architecture(path)
        except ConfigError as error:
            return f"it serves {path}, which cannot be the model that the run trains: {error}"
        if replace(served, max_positions=self.architecture.max_positions) != self.architecture:
            return f"it serves {path}, whose shape is not that of the model that the run trains. {fix}"
        return None

    def _room(self, server: Mapping[str, Any]) -> str | None:
        if (input_limit := server.get("max_req_input_len")) is None:
            return None  # another version of SGLang: cut responses are found one by one
        wanted, room = self.prompt_tokens + self.response_tokens, input_limit + RESERVED
        if wanted <= room and self.prompt_tokens < input_limit:
            return None
        return (
            f"it has room for {room} tokens of prompt and response, and prompts of less than {input_limit}; the run "
            f"needs {wanted}, {self.prompt_tokens} of them for the prompt. Fix: lower data.max_prompt_tokens or "
            "rollout.max_response_tokens, or start the server with a larger --context-length, --mem-fraction-static "
            "or --max-total-tokens"
        )

    def _memory(self, server: Mapping[str, Any]) -> str | None:
        if self.memory_saver and server.get("device") != "cpu" and not server.get("enable_memory_saver"):
            return "it cannot give its memory back (rollout.sglang.colocated). Fix: start it with --enable-memory-saver"
        return None


def _sampling(model: Mapping[str, Any], server: Mapping[str, Any]) -> str | None:
    if server.get("enable_deterministic_inference"):
        # Random numbers depend on seed and position only, which all responses of a group share.
        return "all responses of a group would be the same. Fix: start it without --enable-deterministic-inference"
    for info in (model, server):
        if preferred := info.get("preferred_sampling_params"):
            fix = "Fix: start it without --preferred-sampling-params"
            return f"it samples with {preferred} unless told otherwise. {fix}"
    for name, neutral in NEUTRAL_SAMPLING.items():
        if (found := server.get(name, neutral)) != neutral:
            return f"{name} is {found}, which changes what it samples. Fix: start it with {name} {neutral}"
    return None
