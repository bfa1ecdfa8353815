"""Offload the optimizer state to host memory while colocated servers use the device memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn


class OffloadedState:
    """Moves an optimizer's main parameters and state to pinned host memory and back.

    The tensor objects stay the same and are readable while offloaded, for example by checkpoints. Copies run in stream
    order at the speed of the link; pageable memory would take several times as long. The host buffers are reused.
    """

    def __init__(self, optimizer: Any, chunks: Sequence[nn.Module]) -> None:
        """`chunks`: the model chunks. Storages of their parameters are not moved."""
        self._optimizer = optimizer
        self._chunks = chunks
        self._hosts: list[Tensor] = []
        """Host buffer of each moved storage, uint8."""
        self._moved: list[list[Tensor]] = []
        """Tensors of each moved storage; empty while on the device."""
        self._device: torch.device | None = None

    def offload(self) -> None:
        """Move the state to the host and free the device memory. Waits for the copies. No-op if already offloaded."""
        if self._moved:
            return
        moved = self._by_storage()
        sizes = [tensors[0].untyped_storage().nbytes() for tensors in moved]
        if sizes != [host.numel() for host in self._hosts]:
            pinned = torch.cuda.is_available()
            self._hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        for tensors, host in zip(moved, self._hosts, strict=True):
            self._device = tensors[0].device
            host.copy_(_bytes_of(tensors[0].untyped_storage()), non_blocking=True)
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for tensors, host in zip(moved, self._hosts, strict=True):
            _move(tensors, host)
        self._moved = moved

    def restore(self) -> None:
        """Move the state back to the device, in stream order. No-op if not offloaded."""
        for tensors, host in zip(self._moved, self._hosts, strict=bool(self._moved)):
            _move(tensors, torch.empty_like(host, device=self._device).copy_(host, non_blocking=True))
        self._moved = []

    def _by_storage(self) -> list[list[Tensor]]:
        """Main parameters and state grouped by storage, in a fixed order."""
        own = {p.untyped_storage().data_ptr() for chunk in self._chunks for p in chunk.parameters()}
        found: dict[int, list[Tensor]] = {}
        for tensor in _tensors(self._optimizer):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and storage.nbytes():
                found.setdefault(storage.data_ptr(), []).append(tensor)
        return list(found.values())


def _move(tensors: Sequence[Tensor], memory: Tensor) -> None:
    """Point all tensors of one storage to `memory`, which holds the same bytes."""
    for tensor in tensors:
        there = torch.empty(0, dtype=tensor.dtype, device=memory.device)
        there.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]
        tensor.data = there


def _tensors(optimizer: Any) -> Iterator[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None or getattr(part, "is_stub_optimizer", False):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (x for x in inner.state.get(parameter, {}).values() if isinstance(x, Tensor) and x.dim())


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload,no-any-return]
