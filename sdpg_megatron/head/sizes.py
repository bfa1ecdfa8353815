"""Default sizes of the head: rows of a chunk, columns of a tile, rows of the product of the weight gradient.

docs/head.md has the measurements behind the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["grad_in_forward", "recompute"]
"""See `HeadOptions.schedule`."""

CPU_BYTES = 320 << 20
"""Memory for a chunk's logits on a CPU, in bytes. More is not faster (benchmarks/head.py)."""
CUDA_BYTES = 4800 << 20
"""Memory for logits and kept logit gradients on a GPU, in bytes. At V 151936 it holds a chunk of 2048 rows (products of
4096 rows if teacher and student share a matrix) and 8192 rows of gradients."""
FREE_SHARE = 0.25
"""Largest share of the free memory that the head uses. Free memory is measured when the model is built: optimizer state
and activations are allocated later and are several times as large as the head's memory."""
LEAST_ROWS = 16
"""Minimum rows of a chunk, even if they do not fit."""
CPU_ROWS = 256
"""Maximum rows of a chunk on a CPU. At this size, reading and writing the float32 weight gradient once per chunk is a
small part of the chunk's cost."""
CUDA_ROWS = 4096
"""Maximum rows of a chunk on a GPU. More rows make the products hardly faster."""
AUTO_ROWS = {"cuda": 512, "cpu": 64}
"""Minimum rows of a chunk for "auto" to choose `grad_in_forward`. With fewer rows `recompute` is faster."""
CPU_TILE = 2048
"""Columns of a tile on a CPU: a tile of a few hundred rows stays in the processor's cache."""
CUDA_TILE = 16384
"""Columns of a tile on a GPU, unless the tile is the whole shard."""
GROUP_CHUNKS = 4
"""Minimum chunks in a group (one product of the weight gradient) for which the chunk size reserves memory."""
SCRATCH = 5
"""Temporaries of a tile's size in the plain torch elementwise work. The Triton kernels need none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Shape of a rank's output matrix shard, and the implementation: the inputs of the default sizes."""

    columns: int
    """Vocabulary columns of this rank."""
    hidden: int
    cuda: bool
    fused: bool
    """Triton does the elementwise work."""
    logit_bytes: int = 4
    """Bytes per logit."""
    gradient_bytes: int = 2
    """Bytes per kept logit gradient, which has the weight's type."""
    top_k: bool = False
    """The divergence selects top tokens, which takes many temporaries of a tile's size."""

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the float32 weight gradient that `grad_in_forward` keeps until the backward pass."""
        return self.logit_bytes * self.columns * self.hidden

    def auto_rows(self) -> int:
        return AUTO_ROWS["cuda" if self.cuda else "cpu"]

    def default_bytes(self) -> int:
        """Default memory for logits and logit gradients, in bytes."""
        return CUDA_BYTES if self.cuda else CPU_BYTES

    def tile_columns(self, schedule: Schedule) -> int:
        """Columns of a tile. On a GPU the whole shard if all logits are in memory anyway: fewer, larger kernels."""
        if not self.cuda:
            return CPU_TILE
        whole = schedule == "grad_in_forward" and self.fused and not self.top_k
        return max(self.columns, 1) if whole else CUDA_TILE

    def logits_bytes(self, schedule: Schedule, distributions: int = 2) -> int:
        """Bytes per row of a chunk: logits of one (student) or two `distributions`, and scratch."""
        tile = min(self.columns, self.tile_columns(schedule))
        held = self.columns if schedule == "grad_in_forward" else tile
        scratch = 0 if self.fused else SCRATCH * tile
        return self.logit_bytes * (distributions * held + scratch)

    def chunk_rows(self, schedule: Schedule, budget: int) -> int:
        """Rows of a chunk, a power of two, that fit `budget` bytes with their logit gradients."""
        kept = 0
        if self.cuda:
            width = GROUP_CHUNKS * self.columns if schedule == "grad_in_forward" else self.tile_columns(schedule)
            kept = self.gradient_bytes * width
        rows = max(budget, 0) // max(self.logits_bytes(schedule) + kept, 1)
        most = CUDA_ROWS if self.cuda else CPU_ROWS
        return max(LEAST_ROWS, min(most, 1 << max(rows, 1).bit_length() - 1))

    def group_rows(self, schedule: Schedule, budget: int, chunk_rows: int) -> int:
        """Rows whose logit gradients are kept for one product: as many as fit `budget` besides a chunk's logits.

        0 on a CPU, where gradients overwrite the logits and are multiplied tile by tile.
        """
        if not self.cuda or schedule == "recompute":
            return 0
        left = budget - chunk_rows * self.logits_bytes(schedule)
        chunks = left // max(self.gradient_bytes * self.columns * chunk_rows, 1)
        return chunk_rows * max(2, chunks)
