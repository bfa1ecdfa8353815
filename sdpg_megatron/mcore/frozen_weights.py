"""Copies of this rank's weights in host memory: the reference, and teachers that do not move as the student does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FrozenWeights:
    """A copy of this rank's weights in host memory, which the model can compute with."""

    def __init__(self, chunks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> None:
        """`dtype`: of the copy; None for the weights' own."""
        pin = torch.cuda.is_available()
        copies = [p.detach().to("cpu", dtype, copy=True) for p in _parameters(chunks)]
        self.tensors = [copy.pin_memory() for copy in copies] if pin else copies
        """In the order of the chunks' parameters."""

    @contextmanager
    def swapped_in(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """Let the model compute with these weights; its own storage stays untouched and comes back bit for bit."""
        parameters = _parameters(chunks)
        live = [p.data for p in parameters]
        try:
            for parameter, weight in zip(parameters, self.tensors, strict=True):
                parameter.data = weight.to(parameter.device, parameter.dtype, non_blocking=True)
            yield
        finally:
            for parameter, data in zip(parameters, live, strict=True):
                parameter.data = data

    def of(self, parameter: nn.Parameter, chunks: Sequence[nn.Module]) -> Tensor:
        """The copy of one of the chunks' parameters, as `swapped_in` would put it in place."""
        (found,) = (copy for own, copy in zip(_parameters(chunks), self.tensors, strict=True) if own is parameter)
        return found.to(parameter.device, parameter.dtype, non_blocking=True)

    def follow(self, chunks: Sequence[nn.Module], share: float = 1.0) -> None:
        """Move a share of the way to the chunks' present weights; 1 is a new copy of them, to the bit."""
        with torch.no_grad():
            for copy, parameter in zip(self.tensors, _parameters(chunks), strict=True):
                present = parameter.detach().to("cpu", copy.dtype)
                copy.copy_(present) if share == 1 else copy.lerp_(present, share)


def _parameters(chunks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for chunk in chunks for p in chunk.parameters()]
