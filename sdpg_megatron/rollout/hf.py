"""Embedded engine: transformers in this process, with the same weight stream as servers.

Shapes: B sequences of a batch, U distinct prompts among them, P left-padded prompt length, N generated length,
V vocabulary, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessorList

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.data.tokenizer import stop_ids
from sdpg_megatron.errors import NumericsError, RolloutError
from sdpg_megatron.records import Completion, FinishReason, Group, Prompt
from sdpg_megatron.rollout.base import Abandoned, Bucket, Sampling, Stop, compact, never
from sdpg_megatron.rollout.transformers_check import check_reading
from sdpg_megatron.weights.bucket import StreamCheck
from sdpg_megatron.weights.hf_moe_names import as_saved

if TYPE_CHECKING:
    from sdpg_megatron.records import Routing

UNCONSTRAINED: Mapping[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
UNTRUNCATED: Mapping[str, Any] = {"top_k": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Generation parameters that do not change the model's distribution; these apply to sampling only. transformers fills
unset ones from the model's, then from its defaults (top-k 50)."""


class HFEngine:
    """Generates with transformers, after the first publish."""

    def __init__(
        self, model_folder: Path, *, batch_size: int, device: torch.device, dtype: torch.dtype, tokenizer: Any
    ) -> None:
        """Build the model from its configuration without the folder's weights.

        Args:
            model_folder: Hugging Face folder with config.json and, for the stop ids, generation_config.json.
            batch_size: sequences per batch.
            tokenizer: transformers tokenizer for the responses.

        Raises:
            ConfigError: the model has no stop token, or transformers reads another model from its config.json.
        """
        arch = read_architecture(model_folder)
        check_reading(model_folder, arch)
        self._stop_ids = stop_ids(model_folder, arch.vocab_size)
        self._batch_size = batch_size
        self._device = device
        self._tokenizer = tokenizer
        self._version = -1
        with device, _Unfilled():  # type: ignore[no-untyped-call]
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder), dtype=dtype)
        # The model's own defaults may have top-k or a repetition penalty.
        model.generation_config = GenerationConfig()
        self._model: Any = model.eval().requires_grad_(False)
        # As in checkpoints: tied weights once, and without non-persistent buffers.
        saved = model.state_dict().keys()
        tensors = chain(model.named_parameters(), model.named_buffers())
        self._targets: dict[str, Tensor] = {
            part: view
            for name, tensor in tensors
            if name in saved
            for part, view in as_saved(name, tensor, model.config.model_type)
        }

    @property
    def weight_version(self) -> int:
        """See `RolloutEngine`; -1 also after a failed publish."""
        return self._version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Stop = never) -> list[Group]:
        """See `RolloutEngine`. Samples from the softmax at `temperature`, cut by `top_p`. `stop` is called per token.

        Raises:
            NumericsError: the model's logits are not finite.
        """
        self._require_open()
        if self._version < 0:
            raise RolloutError("generate: no complete set of weights was published. Fix: publish first")
        n = sampling.n
        # Batch prompts of similar length.
        order = sorted(range(len(prompts) * n), key=lambda i: len(prompts[i // n].student_tokens))
        completions: dict[int, Completion] = {}
        with _seeded(self._device, sampling.seed):
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                unique = list(dict.fromkeys(i // n for i in batch))
                copies = [unique.index(i // n) for i in batch]
                tokens = [prompts[i].student_tokens for i in unique]
                completions.update(zip(batch, self._complete(tokens, copies, sampling, stop), strict=True))
        return [
            Group(prompt, tuple(completions[i] for i in range(first, first + n)))
            for prompt, first in zip(prompts, range(0, len(order), n), strict=True)
        ]

    @torch.no_grad()
    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """See `RolloutEngine`. A faulty stream is read to its end too, as its source may be collective."""
        self._require_open()
        self._version = -1
        check = StreamCheck({name: target.shape for name, target in self._targets.items()})
        for bucket in buckets:
            for name, tensor in bucket:
                if check.accept(name, tensor.shape):
                    self._targets[name].copy_(tensor)
        check.finish(f"publish of version {version}")
        self._version = version

    def close(self) -> None:
        self._model = None
        self._targets = {}
        self._version = -1

    def _require_open(self) -> None:
        if self._model is None:
            raise RolloutError("the engine is closed")

    def _complete(
        self, prompts: Sequence[Sequence[int]], copies: Sequence[int], sampling: Sampling, stop: Stop
    ) -> list[Completion]:
        """Generate B completions, number b of ``prompts[copies[b]]``, for U prompts."""
        width = max(map(len, prompts))
        pad_id = self._stop_ids[0]
        tokens_UP = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask_UP = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens_UP, mask_UP = tokens_UP.to(self._device), mask_UP.to(self._device)
        copies_B = torch.tensor(copies, device=self._device)
        recorder = _LogprobRecorder(sampling.temperature or 1.0)
        with ExpertRecorder(self._model) if sampling.experts else nullcontext() as experts:
            output_BS = self._model.generate(
                tokens_UP[copies_B],
                attention_mask=mask_UP[copies_B],
                past_key_values=self._prefill(tokens_UP, mask_UP, copies_B),
                generation_config=self._generation_config(sampling),
                logits_processor=LogitsProcessorList([_Watch(stop), recorder]),
            )
        tokens_BN = output_BS[:, width:]
        rows = zip(tokens_BN.tolist(), recorder.logprobs(tokens_BN).tolist(), strict=True)
        found = [self._completion(tokens, logprobs) for tokens, logprobs in rows]
        if experts is None:
            return found
        routings = experts.routings([len(p) for p in prompts], copies, [len(c.tokens) for c in found])
        return [replace(completion, experts=routing) for completion, routing in zip(found, routings, strict=True)]

    def _prefill(self, tokens_UP: Tensor, mask_UP: Tensor, copies_B: Tensor) -> Any:
        """KV cache of all prompt tokens but the last, for B rows; each of the U prompts is prefilled once."""
        cache = DynamicCache(config=self._model.config)
        if tokens_UP.shape[1] > 1:
            positions_UP = (mask_UP.cumsum(-1) - 1).clamp(min=0)
            self._model.base_model(
                tokens_UP[:, :-1],
                attention_mask=mask_UP[:, :-1],
                position_ids=positions_UP[:, :-1],
                past_key_values=cache,
            )
            cache.batch_select_indices(copies_B)
        return cache

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, **UNTRUNCATED}
        return GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(self._stop_ids),
            pad_token_id=self._stop_ids[0],
            **UNCONSTRAINED,
            **how,
        )

    def _completion(self, tokens: list[int], logprobs: list[float]) -> Completion:
        """Cut a generated row after its first stop token."""
        length = next((i for i, token in enumerate(tokens, start=1) if token in self._stop_ids), None)
        finish_reason: FinishReason = "length" if length is None else "stop"
        return Completion(
            tokens=np.array(tokens[:length], np.int32),
            logprobs=np.array(logprobs[:length], np.float32),
            finish_reason=finish_reason,
            weight_version=self._version,
            text=self._tokenizer.decode(tokens[:length], skip_special_tokens=True),
        )


class _Watch:
    """Logits processor that ends the generation between two tokens once `stop` returns True."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, tokens_BS: Tensor, logits_BV: Tensor) -> Tensor:
        if self._stop():
            raise Abandoned
        return logits_BV


class _LogprobRecorder:
    """Logits processor that records the log-prob of each chosen token.

    transformers calls it before its temperature and top-p. At each call the previous step's token is known, so only one
    step's [B, V] log-probs are held.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._chosen: list[Tensor] = []
        self._last_BV: Tensor | None = None

    def __call__(self, tokens_BS: Tensor, logits_BV: Tensor) -> Tensor:
        if self._last_BV is not None:
            self._chosen.append(self._last_BV.gather(1, tokens_BS[:, -1:]))
        self._last_BV = torch.log_softmax(logits_BV.float() / self._temperature, dim=-1)
        if self._last_BV.isnan().any():
            where = f"response token {len(self._chosen) + 1}"
            raise NumericsError(
                f"rollout: found logits that are not finite at {where}, expected finite ones. Fix: the weights are too "
                "large for the model's dtype, or damaged: start from the last checkpoint, or from another model"
            )
        return logits_BV

    def logprobs(self, tokens_BN: Tensor) -> Tensor:
        """Log-probs of the generated tokens, float32 [B, N]."""
        assert self._last_BV is not None
        # If transformers detects the end one step late, it drops that step's token; the last is already recorded.
        chosen = [*self._chosen, self._last_BV.gather(1, tokens_BN[:, -1:])]
        return torch.cat(chosen[: tokens_BN.shape[1]], dim=1)


class _Unfilled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Skips random initialization, which takes minutes for billions of parameters that are overwritten."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators inside the context, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class ExpertRecorder:
    """Context that records the experts chosen by every router, per call, on the device."""

    def __init__(self, model: nn.Module) -> None:
        self._per_token = int(model.config.num_experts_per_tok)  # type: ignore[union-attr, arg-type]
        self._gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
        self._calls: list[list[Tensor]] = [[] for _ in self._gates]
        self._hooks: list[Any] = []

    def __enter__(self) -> ExpertRecorder:
        for gate, calls in zip(self._gates, self._calls, strict=True):
            self._hooks.append(gate.register_forward_hook(lambda _, __, out, calls=calls: calls.append(self._of(out))))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _of(self, output: Any) -> Tensor:
        """Chosen experts [tokens, K] from a router's output: with choices since transformers 5, logits before."""
        chosen: Tensor = output[2] if isinstance(output, tuple) else output.float().topk(self._per_token).indices
        return chosen.to(torch.int16)

    def routings(self, prompts: Sequence[int], copies: Sequence[int], responses: Sequence[int]) -> list[Routing]:
        """Routing of each sequence's tokens but the last.

        Args:
            prompts: lengths of the U prompts; all tokens but the last were prefilled in the first call.
            copies: prompt of each of the B sequences, which were then decoded token by token.
            responses: response lengths of the B sequences.
        """
        width = max(prompts) - 1
        first = 1 if width else 0
        read_BNLK = torch.stack([torch.stack(calls[first:], dim=1) for calls in self._calls], dim=2).cpu()
        prompt_UPLK = read_BNLK[:0, :0]
        if first:
            calls_UPK = [calls[0].view(len(prompts), width, -1) for calls in self._calls]
            prompt_UPLK = torch.stack(calls_UPK, dim=2).cpu()
        found = []
        for b, (copy, length) in enumerate(zip(copies, responses, strict=True)):
            parts = [prompt_UPLK[copy, width - prompts[copy] + 1 :]] if first else []
            found.append(compact(torch.cat([*parts, read_BNLK[b, :length]]).numpy()))
        return found
