"""A bucket as one run of bytes, with its tensors laid end to end: how broadcast and shared memory carry it.

SGLang reads such a run as a "flattened_bucket": tensor after tensor without gaps, each on a multiple of its element
size. Source: sglang.srt.weight_sync.tensor_bucket of SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpg_megatron.weights import Bucket


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's place in a run: bytes `start` to `end`."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    end: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Flat:
    """A bucket's bytes, uint8 [n], and what lies where."""

    run: Tensor
    spans: Sequence[Span]


def lay_out(bucket: Bucket) -> list[tuple[Span, Tensor]]:
    """Places without gaps, every tensor aligned: larger elements first, otherwise in the bucket's order."""
    placed: list[tuple[Span, Tensor]] = []
    end = 0
    for name, tensor in sorted(bucket, key=lambda item: -item[1].itemsize):
        start, end = end, end + tensor.nbytes
        placed.append((Span(name, tensor.dtype, tensor.shape, start, end), tensor))
    return placed


def size_of(bucket: Bucket) -> int:
    """Bytes."""
    return sum(tensor.nbytes for _, tensor in bucket)


def as_run(bucket: Bucket) -> Flat:
    """The bucket as one run: a view where there is one, as of a weight stream's; else a copy."""
    run = find_run(bucket)
    return run or copy_to(torch.empty(size_of(bucket), dtype=torch.uint8, device=bucket[0][1].device), bucket)


def find_run(bucket: Bucket) -> Flat | None:
    """A view of the bucket as one run, where its tensors lie end to end."""
    placed = lay_out(bucket)
    spans = [span for span, _ in placed]
    first = placed[0][1]
    storage, base = first.untyped_storage(), first.data_ptr()
    for span, tensor in placed:
        together = tensor.untyped_storage().data_ptr() == storage.data_ptr()
        if not (together and tensor.is_contiguous() and tensor.data_ptr() == base + span.start):
            return None
    run = torch.empty(0, dtype=torch.uint8, device=first.device)
    run.set_(storage, base - storage.data_ptr(), (spans[-1].end,), (1,))  # type: ignore[call-overload]
    return Flat(run, spans)


def copy_to(memory: Tensor, bucket: Bucket) -> Flat:
    """The bucket, copied to the start of `memory`, uint8 [at least its size] on any device."""
    placed = lay_out(bucket)
    for span, tensor in placed:
        memory[span.start : span.end].view(span.dtype).view(span.shape).copy_(tensor)
    return Flat(memory[: placed[-1][0].end], [span for span, _ in placed])
