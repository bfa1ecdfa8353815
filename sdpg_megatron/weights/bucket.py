"""A bucket of a weight stream: named tensors in one contiguous run of bytes, and the check of a whole stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sdpg_megatron.errors import WeightError, did_you_mean
from sdpg_megatron.weights.map import Shape

LISTED = 8
"""Faults that one error message names."""

Allocate = Callable[[int, torch.device], Tensor]
"""(bytes, device) -> memory, uint8 [at least bytes], not in use elsewhere."""


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """Allocate new memory."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Scratch:
    """Memory for one use at a time, kept and grown as needed: on CPUs new memory is several times slower to fill."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """An `Allocate`."""
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old memory first
            self._memory = allocate(nbytes, device)
        return self._memory


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's place in a bucket's memory, from byte `start`."""

    name: str
    dtype: torch.dtype
    shape: Shape
    start: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class Bucket(Iterable[tuple[str, Tensor]]):
    """Whole tensors under their Hugging Face names; iteration gives (name, view of `memory`).

    Tensors are laid end to end without gaps, larger elements first, so that each starts at a multiple of its element
    size. SGLang reads the same layout as a "flattened_bucket".
    Source: sglang.srt.weight_sync.tensor_bucket of SGLang 0.5.23.
    """

    memory: Tensor
    """uint8 [nbytes]."""
    specs: Sequence[TensorSpec]
    """In the order of the memory."""

    def __init__(
        self, specs: Iterable[TensorSpec], device: torch.device | None = None, allocate: Allocate = allocate
    ) -> None:
        """Allocate uninitialized tensors; the `start` of the given specs is ignored."""
        placed: list[TensorSpec] = []
        end = 0
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            placed.append(TensorSpec(spec.name, spec.dtype, spec.shape, end))
            end = placed[-1].end
        self.specs = placed
        self.memory = allocate(end, device or torch.device("cpu"))[:end] if end else torch.empty(0, dtype=torch.uint8)

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Tensor]]) -> Bucket:
        """Copy tensors, all on one device, into a new bucket."""
        sources = dict(tensors)
        device = next(iter(sources.values())).device if sources else None
        bucket = cls((TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in sources.items()), device)
        for name, tensor in bucket:
            tensor.copy_(sources[name])
        return bucket

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for spec in self.specs:
            yield spec.name, self.memory[spec.start : spec.end].view(spec.dtype).view(spec.shape)

    def __len__(self) -> int:
        return len(self.specs)


class StreamCheck:
    """Check that a weight stream has every expected tensor once, with its shape."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """
        Args:
            shapes: shape of each expected tensor.
        """
        self._shapes = shapes
        self._missing = dict.fromkeys(shapes)
        self.faults: list[str] = []

    def accept(self, name: str, shape: Sequence[int]) -> bool:
        """Record a tensor. True if it is expected, new and of the right shape."""
        expected = self._shapes.get(name)
        if expected is None:
            self.faults.append(" ".join(filter(None, (f"{name} is unknown;", did_you_mean(name, self._shapes)))))
        elif name not in self._missing:
            self.faults.append(f"{name} came twice")
        else:
            del self._missing[name]
            if tuple(shape) == tuple(expected):
                return True
            self.faults.append(f"{name} is {tuple(shape)}, expected {tuple(expected)}")
        return False

    def finish(self, where: str) -> None:
        """Raise `WeightError` if a tensor was refused or is missing; `where` begins the message."""
        faults = self.faults + [f"{name} is missing" for name in self._missing]
        if faults:
            raise WeightError(f"{where}: {listed(faults)}")


def listed(items: Sequence[str]) -> str:
    """Join the first items for an error message, with the number of those left out."""
    more = f", and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


class HasBytes(Protocol):
    """Anything with a size in bytes."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=HasBytes)


def in_buckets(items: Iterable[T], bucket_bytes: int) -> Iterator[list[T]]:
    """Group consecutive items into buckets of at most `bucket_bytes`; a larger item has a bucket to itself."""
    bucket: list[T] = []
    held = 0
    for item in items:
        if bucket and held + item.nbytes > bucket_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += item.nbytes
    yield bucket
