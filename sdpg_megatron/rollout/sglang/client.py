"""HTTP client of one SGLang server: generation, weight updates, memory.

Every method is a coroutine that sends one request with a timeout. Retries are up to the pool and the publish session.
Source of the endpoints: sglang.srt.entrypoints.http_server of SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from sdpg_megatron.errors import ServerError
from sdpg_megatron.records import FinishReason
from sdpg_megatron.rollout.base import Sampling

UNLIMITED = aiohttp.ClientTimeout(total=None)
QUOTED = 300
"""Characters of a server's answer quoted in an error."""
REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}
"""SGLang's finish types; all others count as aborted."""
UNCONSTRAINED: Mapping[str, object] = {
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "ignore_eos": False,
    "stop": None,
    "regex": None,
    "json_schema": None,
    "ebnf": None,
    "logit_bias": None,
}
"""Sampling parameters that do not change the model's distribution. Every request has them, so that no default of the
server applies. Source: sglang.srt.sampling.sampling_params of SGLang 0.5.23."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    control: float = 60.0
    """For short calls."""
    update: float = 600.0
    """For calls that move weights."""
    generate: float = 3600.0
    """For a whole response."""
    health: float = 30.0


@dataclass(frozen=True, slots=True)
class GeneratedSample:
    """One response of a server."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: frozenset[str]
    """Weight versions of its tokens; several if the weights changed in between."""
    experts: bytes | None = None
    """int32 expert numbers of all tokens but the last, layer by layer; None if not returned."""


@dataclass(frozen=True, slots=True)
class RankChecksums:
    """Checksums of one rank's parameters, by the server's parameter names."""

    tensor_rank: int
    by_name: Mapping[str, str]


class Client:
    """A server at one URL; used in one event loop only."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeouts: Timeouts | None = None,
        starts: Callable[[], int] | None = None,
    ) -> None:
        """
        Args:
            url: scheme, host and port.
            api_key: for generation; also for all other calls if `admin_key` is None.
            admin_key: for calls that change the server.
            starts: number of times that this run has started the server; None for a server at `urls`.
        """
        self.url = url.rstrip("/")
        self.timeouts = timeouts or Timeouts()
        self._starts = starts
        self._keys = {False: api_key, True: admin_key or api_key}
        # Callers bound the number of requests. trust_env would use a proxy for the run's own hosts.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False)
        self._paths: frozenset[str] | None = None

    async def close(self) -> None:
        await self._session.close()

    # --- generation

    async def generate(
        self, tokens: Sequence[int], sampling: Sampling, stop_ids: Sequence[int]
    ) -> list[GeneratedSample]:
        """Generate `sampling.n` responses to one prompt, which the server prefills once.

        Log-probs are of the softmax at `sampling.temperature` (1 for greedy), before top-p.

        Raises:
            ServerError: see `_call`; or the answer does not fit the request.
        """
        params: dict[str, Any] = {
            **UNCONSTRAINED,
            "n": sampling.n,
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(stop_ids),
        }
        body = {"input_ids": list(tokens), "sampling_params": params, "return_logprob": True}
        if sampling.experts:
            body["return_routed_experts"] = True
        found = await self._call("POST", "/generate", body, timeout=self.timeouts.generate)
        answers = found if isinstance(found, list) else [found]
        if len(answers) != sampling.n:
            raise ServerError(self.url, "/generate", f"{len(answers)} responses, expected {sampling.n}", retryable=True)
        return [self._sample(answer) for answer in answers]

    def _sample(self, answer: Mapping[str, Any]) -> GeneratedSample:
        try:
            meta = answer["meta_info"]
            pairs = meta.get("output_token_logprobs") or []
            spans = meta.get("weight_versions") or []
            versions = {str(span["version"]) for span in spans} | {str(meta["weight_version"])}
            kind = (meta["finish_reason"] or {}).get("type")
            experts = meta.get("routed_experts")
            tokens = tuple(int(token) for token in answer["output_ids"])
            sample = GeneratedSample(
                tokens=tokens,
                logprobs=tuple(float(pair[0]) for pair in pairs),
                finish_reason=REASONS.get(str(kind), "abort"),
                versions=frozenset(versions),
                experts=None if experts is None else b64decode(experts, validate=True),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerError(self.url, "/generate", f"an answer that cannot be read ({error!r})") from error
        if sample.finish_reason != "abort" and [int(pair[1]) for pair in pairs] != list(tokens):
            raise ServerError(self.url, "/generate", "log-probs of other tokens than the response's")
        return sample

    # --- information

    async def alive(self) -> bool:
        """True if the server reports in time that it is healthy."""
        try:
            await self._call("GET", "/health", timeout=self.timeouts.health)
        except ServerError:
            return False
        return True

    async def model_info(self) -> Mapping[str, Any]:
        """``model_path``, ``weight_version`` and more."""
        return await self._ask("/model_info")

    async def server_info(self) -> Mapping[str, Any]:
        """The server's arguments, for example ``tp_size``, ``dp_size``, ``context_length``."""
        return await self._ask("/server_info")

    def start_of(self, info: Mapping[str, Any]) -> object:
        """Value that is equal for two answers of `server_info` only without a restart between them.

        SGLang 0.5.15 has no start time. For such a server that this run did not start, no two values are equal.
        """
        if (told := info.get("startup_time")) is not None:
            return told
        return object() if self._starts is None else self._starts()

    async def _ask(self, path: str) -> Mapping[str, Any]:
        info = await self._call("GET", path)
        if not isinstance(info, dict):
            raise ServerError(self.url, path, "no JSON object: is it an SGLang server?")
        return info

    async def weight_version(self) -> str:
        return str((await self.model_info()).get("weight_version"))

    async def offers(self, path: str) -> bool:
        """True if the server has an endpoint, read once from /openapi.json."""
        if self._paths is None:
            self._paths = frozenset((await self._call("GET", "/openapi.json"))["paths"])
        return path in self._paths

    # --- weights

    async def pause(self) -> None:
        """Abort all running requests, and hold new ones until `resume`."""
        await self._admin("/pause_generation", {"mode": "abort"})

    async def resume(self) -> None:
        """Continue after `pause`."""
        await self._admin("/continue_generation", {})

    async def flush_cache(self, wait: float = 0.0) -> None:
        """Clear the KV cache.

        Args:
            wait: seconds for the server to become idle; it is an error if it does not.
        """
        query = f"?timeout={wait:g}" if wait else ""
        await self._admin(f"/flush_cache{query}", None, timeout=self.timeouts.control + wait)

    async def begin_update(self) -> None:
        """Open a session of weight updates, if the server has sessions."""
        if await self.offers("/begin_weight_update"):
            await self._admin("/begin_weight_update", {})

    async def end_update(self) -> None:
        """Close the session of weight updates."""
        if await self.offers("/end_weight_update"):
            await self._admin("/end_weight_update", {}, timeout=self.timeouts.update)

    async def set_version(self, version: str) -> None:
        """Set the weight version of later samples."""
        await self._admin("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    async def join_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, group: str, backend: str
    ) -> None:
        """Have the server's ranks join a process group, from `rank_offset` on; returns when all members have joined."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._admin("/init_weights_update_group", body, timeout=self.timeouts.update)

    async def leave_group(self, group: str) -> None:
        await self._admin("/destroy_weights_update_group", {"group_name": group})

    async def receive(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], group: str
    ) -> None:
        """Take tensors from one broadcast of their bytes, laid end to end, by rank 0 of a process group.

        Args:
            dtypes: torch's names, without "torch.".
        """
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._admin("/update_weights_from_distributed", body, timeout=self.timeouts.update)

    async def take(self, handles: Sequence[str], load_format: str | None = None) -> None:
        """Read tensors from shared memory.

        Args:
            handles: a base64 pickle for each of the server's tensor-parallel ranks.
        """
        body = {"serialized_named_tensors": list(handles), "load_format": load_format, "flush_cache": False}
        await self._admin("/update_weights_from_tensor", body, timeout=self.timeouts.update)

    async def load(self, folder: str) -> None:
        """Load a Hugging Face folder that is visible to the server."""
        body = {"model_path": folder, "flush_cache": False}
        await self._admin("/update_weights_from_disk", body, timeout=self.timeouts.update)

    async def checksums(self) -> list[RankChecksums]:
        """Checksums of every parameter of every rank."""
        found = await self._admin("/weights_checker", {"action": "checksum"}, timeout=self.timeouts.update)
        try:
            return [RankChecksums(_place(rank)["tp_rank"], rank["checksums"]) for rank in found["ranks"]]
        except (KeyError, TypeError, IndexError) as error:
            raise ServerError(self.url, "/weights_checker", f"an answer that cannot be read ({error!r})") from error

    async def randomize_weights(self) -> None:
        """Overwrite every parameter of the model with random values."""
        body = {"action": "reset_tensors", "selector": "target"}
        await self._admin("/weights_checker", body, timeout=self.timeouts.update)

    # --- memory

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Release the memory of "weights", "kv_cache", "cuda_graph". The server must be idle."""
        await self._admin("/release_memory_occupation", {"tags": list(tags)}, timeout=self.timeouts.update)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Allocate memory again; its content is lost."""
        await self._admin("/resume_memory_occupation", {"tags": list(tags)}, timeout=self.timeouts.update)

    # --- requests

    async def _admin(self, path: str, body: object, *, timeout: float | None = None) -> Any:
        """Send a request that changes the server. Raises `ServerError` as `_call`, or if the answer reports failure."""
        found = await self._call("POST", path, body, timeout=timeout, admin=True)
        if isinstance(found, dict) and found.get("success") is False:
            raise ServerError(self.url, path, str(found.get("message"))[:QUOTED])
        return found

    async def _call(
        self, method: str, path: str, body: object = None, *, timeout: float | None = None, admin: bool = False
    ) -> Any:
        """Send one request; return the answer's JSON, or its text if it has none.

        Raises:
            ServerError: no connection, no answer in time, or a status of 400 or more. `retryable` unless the status
                blames the request.
        """
        seconds = self.timeouts.control if timeout is None else timeout
        headers = {"Authorization": f"Bearer {key}"} if (key := self._keys[admin]) else {}
        try:
            # aiohttp's timeout swallows a cancellation that arrives when it expires (3.14).
            async with (
                asyncio.timeout(seconds),
                self._session.request(method, self.url + path, json=body, headers=headers, timeout=UNLIMITED) as answer,
            ):
                if answer.status >= 400:
                    text = (await answer.text())[:QUOTED]
                    at_fault = answer.status < 500 and answer.status not in (408, 429)
                    raise ServerError(self.url, path, f"status {answer.status}: {text}", retryable=not at_fault)
                return await (answer.json() if answer.content_type == "application/json" else answer.text())
        except TimeoutError as error:
            raise ServerError(self.url, path, f"no answer within {seconds:g} s", retryable=True) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: invalid JSON
            raise ServerError(self.url, path, f"{type(error).__name__}: {error}", retryable=True) from error


def _place(rank: Mapping[str, Any]) -> Mapping[str, Any]:
    """A rank's coordinates: one mapping in SGLang 0.5.15, later one per model with a draft model last."""
    info = rank["parallelism_info"]
    place: Mapping[str, Any] = info if isinstance(info, dict) else info[0]
    return place
