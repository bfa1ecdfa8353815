"""Asynchronous copies between host and device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sdpg_megatron.records import MicroBatch

ALIGNMENT = 16
"""Alignment in bytes of tensors that share a buffer; a multiple of every element size."""


def to_device(batches: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """Copy the tensors of a step's micro-batches to `device`, in one transfer from pinned memory to a GPU.

    The tensors of the result share one buffer.
    """
    tensors: list[Tensor] = []

    def collected(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    for batch in batches:
        batch.mapped(collected)
    starts = [0, *itertools.accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)]
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, start in zip(tensors, starts, strict=False):
        _part(host, start, tensor).copy_(tensor)
    there = host.to(device, non_blocking=True)
    moved = iter([_part(there, start, tensor) for tensor, start in zip(tensors, starts, strict=False)])
    return [batch.mapped(lambda _: next(moved)) for batch in batches]


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """View of a byte buffer at `start` with the type and shape of `like`."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def host_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory, pinned if it comes from a GPU.

    The copy is asynchronous: later work on the same stream sees it, but the host must synchronize before reading it.
    """
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
