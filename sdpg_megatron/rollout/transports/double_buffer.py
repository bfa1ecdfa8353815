"""Memory that buckets are made in, by turns: one bucket is made while the one before it is sent.

They are kept from publish to publish: memory that was used before is filled several times faster than fresh memory,
whose pages the kernel has yet to find and clear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class ReusableBuffer(Protocol):
    """`memory`, uint8 [size], until `release`."""

    size: int
    memory: Tensor

    def release(self) -> None: ...


B = TypeVar("B", bound=ReusableBuffer)


class DoubleBuffer(Generic[B]):
    """Two buffers, made when they are first needed and again where they are too small."""

    def __init__(self, make: Callable[[int], B]) -> None:
        """`make`: a buffer of so many bytes."""
        self._make = make
        self._buffers: list[B | None] = [None, None]
        self._turn = 0

    def restart(self) -> None:
        """Begin with the same buffer as the last time: it has the size that the first bucket needs."""
        self._turn = 0

    def take(self, nbytes: int) -> B:
        """The buffer that was not taken last. Raises whatever making one raises."""
        turn, self._turn = self._turn, 1 - self._turn
        buffer = self._buffers[turn]
        if buffer is None or buffer.size < nbytes:
            self._release(turn)
            buffer = self._buffers[turn] = self._make(nbytes)
        return buffer

    def holding(self, tensor: Tensor) -> B | None:
        """The buffer in which a tensor lies."""
        place = tensor.untyped_storage().data_ptr()
        for buffer in self._buffers:
            if buffer is not None and buffer.memory.untyped_storage().data_ptr() == place:
                return buffer
        return None

    def each(self, act: Callable[[B], None]) -> None:
        """Do something with each buffer that there is."""
        for buffer in self._buffers:
            if buffer is not None:
                act(buffer)

    def release(self) -> None:
        """Give both back."""
        self._release(0)
        self._release(1)

    def _release(self, turn: int) -> None:
        buffer, self._buffers[turn] = self._buffers[turn], None
        if buffer is not None:
            buffer.release()


class Private:
    """A buffer of this process alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = torch.empty(size, dtype=torch.uint8)

    def release(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
