"""Default sizes of the head: rows of a chunk, columns of a tile, rows of the product that makes the weight's gradient.

The figures that the defaults rest on are in docs/head.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["grad_in_forward", "recompute"]
"""The two orders of work, see `HeadOptions.schedule`."""

CPU_BYTES = 320 << 20
"""Memory for a chunk's logits on a CPU. More makes nothing faster (benchmarks/head.py)."""
CUDA_BYTES = 4800 << 20
"""Memory for logits and kept logit gradients on a GPU. At V 151936 it holds a chunk of 2048 rows, that is products of
4096 rows where teacher and student share a matrix, and 8192 rows of gradients."""
FREE_SHARE = 0.25
"""Most of the free memory that the head plans for. It is asked when the model is built: optimizer state and activations
come later and are several times the head's."""
LEAST_ROWS = 16
"""Least rows of a chunk, however little memory is free."""
CPU_ROWS = 256
"""Most rows of a chunk on a CPU. The float32 gradient of the weight is read and written once a chunk, which then costs
a small part of the chunk's products."""
CUDA_ROWS = 4096
"""Most rows of a chunk on a GPU. More make its products little faster."""
AUTO_ROWS = {"cuda": 512, "cpu": 64}
"""Least rows of a chunk at which `grad_in_forward` is chosen: with fewer, `recompute` is the faster schedule."""
CPU_TILE = 2048
"""Columns of a tile on a CPU: a tile of some hundred rows stays in the processor's cache."""
CUDA_TILE = 16384
"""Columns of a tile on a GPU where it is not the whole shard."""
GROUP_CHUNKS = 4
"""Chunks, at least, whose gradients go into one product for the weight's gradient, when the chunk's size is chosen."""
SCRATCH = 5
"""Tiles of scratch that the elementwise work needs in plain torch. The Triton kernels need none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """A rank's shard of the output matrix and how the head works on it: all that default sizes depend on."""

    columns: int
    """Vocabulary columns of this rank."""
    hidden: int
    cuda: bool
    fused: bool
    """Elementwise work by Triton."""
    logit_bytes: int = 4
    gradient_bytes: int = 2
    """Of a kept logit gradient: the weight's type."""
    top_k: bool = False
    """The divergence selects top tokens, which takes many temporaries of a tile's size."""

    @property
    def matrix_bytes(self) -> int:
        """The float32 gradient of the weight that `grad_in_forward` keeps until the backward pass."""
        return self.logit_bytes * self.columns * self.hidden

    def auto_rows(self) -> int:
        return AUTO_ROWS["cuda" if self.cuda else "cpu"]

    def default_bytes(self) -> int:
        """Memory for logits and logit gradients where nothing else limits it."""
        return CUDA_BYTES if self.cuda else CPU_BYTES

    def tile_columns(self, schedule: Schedule) -> int:
        """Columns worked on at a time. On a GPU all of them where they are held anyway: fewer, larger kernels."""
        if not self.cuda:
            return CPU_TILE
        whole = schedule == "grad_in_forward" and self.fused and not self.top_k
        return max(self.columns, 1) if whole else CUDA_TILE

    def logits_bytes(self, schedule: Schedule, distributions: int = 2) -> int:
        """Bytes for each row of a chunk: logits of student, and teacher if there are two, and scratch."""
        tile = min(self.columns, self.tile_columns(schedule))
        held = self.columns if schedule == "grad_in_forward" else tile
        scratch = 0 if self.fused else SCRATCH * tile
        return self.logit_bytes * (distributions * held + scratch)

    def chunk_rows(self, schedule: Schedule, budget: int) -> int:
        """Rows of a chunk, a power of two, for `budget` bytes of logits and logit gradients."""
        kept = 0
        if self.cuda:
            width = GROUP_CHUNKS * self.columns if schedule == "grad_in_forward" else self.tile_columns(schedule)
            kept = self.gradient_bytes * width
        rows = max(budget, 0) // max(self.logits_bytes(schedule) + kept, 1)
        most = CUDA_ROWS if self.cuda else CPU_ROWS
        return max(LEAST_ROWS, min(most, 1 << max(rows, 1).bit_length() - 1))

    def group_rows(self, schedule: Schedule, budget: int, chunk_rows: int) -> int:
        """Rows whose logit gradients are kept for one product: what a chunk's logits leave of `budget`.

        0 on a CPU: gradients replace the logits there, and are multiplied tile by tile.
        """
        if not self.cuda or schedule == "recompute":
            return 0
        left = budget - chunk_rows * self.logits_bytes(schedule)
        chunks = left // max(self.gradient_bytes * self.columns * chunk_rows, 1)
        return chunk_rows * max(2, chunks)
