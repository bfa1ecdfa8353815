"""Copies of this rank's weights in host memory, for the reference model and for teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FrozenWeights:
    """A copy of this rank's weights in host memory (pinned with CUDA) that can be swapped into the model."""

    def __init__(self, chunks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> None:
        """`dtype`: type of the copy; None: the weights' type."""
        pin = torch.cuda.is_available()
        copies = [p.detach().to("cpu", dtype, copy=True) for p in _parameters(chunks)]
        self.tensors = [copy.pin_memory() for copy in copies] if pin else copies
        """One per parameter of the chunks, in order."""

    @contextmanager
    def swapped_in(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        """Swap these weights into the model. On exit the model has its own storage again, bit-identical."""
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
        """Copy of one of the chunks' parameters, on its device and in its type."""
        (found,) = (copy for own, copy in zip(_parameters(chunks), self.tensors, strict=True) if own is parameter)
        return found.to(parameter.device, parameter.dtype, non_blocking=True)

    def follow(self, chunks: Sequence[nn.Module], share: float = 1.0) -> None:
        """Interpolate towards the current weights of the chunks: ``copy + share (weight - copy)``; 1 copies them."""
        with torch.no_grad():
            for copy, parameter in zip(self.tensors, _parameters(chunks), strict=True):
                present = parameter.detach().to("cpu", copy.dtype)
                copy.copy_(present) if share == 1 else copy.lerp_(present, share)


def _parameters(chunks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for chunk in chunks for p in chunk.parameters()]
