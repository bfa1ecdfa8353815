"""Optimizer state in host memory, while colocated servers have the device's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn


class OffloadedState:
    """Moves an optimizer's main parameters and state to pinned host memory and back.

    The tensors stay the objects that they are; their storages are emptied in between. Copies run in the device's own
    order, at the speed of the link: pageable memory takes several times as long. The host memory is kept for the next
    time.
    """

    def __init__(self, optimizer: Any, chunks: Sequence[nn.Module]) -> None:
        """`chunks`: the model's; storages of their parameters are not moved."""
        self._optimizer = optimizer
        self._chunks = chunks
        self._hosts: dict[int, Tensor] = {}
        self._moved: list[tuple[UntypedStorage, Tensor]] = []

    def offload(self) -> None:
        """Free the device's memory. Returns when that is done; a second call moves nothing."""
        if self._moved:
            return
        for number, storage in enumerate(self._storages()):
            self._moved.append((storage, self._host(number, storage.nbytes())))
        for storage, host in self._moved:
            host.copy_(_bytes_of(storage), non_blocking=True)
        if self._moved and self._moved[0][0].device.type == "cuda":
            torch.cuda.synchronize()
        for storage, _ in self._moved:
            storage.resize_(0)

    def restore(self) -> None:
        """Undo `offload`; nothing where it was not called. What runs on the device afterwards finds the state."""
        for storage, host in self._moved:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host, non_blocking=True)
        self._moved.clear()

    def _host(self, number: int, size: int) -> Tensor:
        host = self._hosts.get(number)
        if host is None or host.numel() != size:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._hosts[number] = host
        return host

    def _storages(self) -> Iterator[UntypedStorage]:
        """Each storage of main parameters and state once, in an order that does not change."""
        seen = {p.untyped_storage().data_ptr() for chunk in self._chunks for p in chunk.parameters()}
        for tensor in _tensors(self._optimizer):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                yield storage


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
