"""Which experts a mixture's tokens are sent to while transformers generates.

Shapes: B sequences, U distinct prompts, P left-padded prompt length, N tokens read one by one, L layers, K experts of a
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdpg_megatron.rollout.base import compact

if TYPE_CHECKING:
    from sdpg_megatron.records import Routing


class ExpertRecorder:
    """While it is open, keeps the choices of every router, call by call, on the device."""

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
        """[tokens, K] of a router's output: its choices are in it since transformers 5, its logits alone before."""
        chosen: Tensor = output[2] if isinstance(output, tuple) else output.float().topk(self._per_token).indices
        return chosen.to(torch.int16)

    def routings(self, prompts: Sequence[int], copies: Sequence[int], responses: Sequence[int]) -> list[Routing]:
        """Of each sequence, all tokens but the last.

        Args:
            prompts: lengths of the U prompts, all tokens of which but the last were read in the first call.
            copies: prompt of each of the B sequences, which were then read token by token.
            responses: their lengths.
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
