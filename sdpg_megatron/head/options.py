"""How a head is to be computed: everything that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from sdpg_megatron.head.divergences import Divergence, ReverseKL
from sdpg_megatron.head.shard import VocabShard

Schedule = Literal["recompute", "grad_in_forward"]
Kernels = Literal["auto", "torch", "triton"]

CPU_BYTES, CUDA_BYTES = 320 << 20, 1600 << 20
"""Logits that are held at a time where memory is no concern. On CPUs more makes nothing faster (benchmarks/head.py);
that for CUDA is not tuned to any GPU."""
FREE_SHARE = 0.25
"""Share of the free memory that the logits may take where it is."""
CPU_TILE = 2048
"""Columns whose elementwise work is done at a time: a tile of some hundred rows then stays in the processor's cache."""
LEAST_ROWS, MOST_ROWS = 16, 8192
CPU_ROWS = 256
"""Most rows of a chunk on a CPU: reading and writing the matrix's gradient for each chunk then costs a small part of
the chunk's products, however few columns a rank has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """Options of `head_terms`, `head_loss`, `head_logprobs` and `logits_terms`; each reads those that concern it."""

    divergence: Divergence = field(default_factory=ReverseKL)
    """What `HeadTerms.divergence_T` is."""
    temperature: float = 1.0
    """Divides the student's logits."""
    teacher_temperature: float | None = None
    """Divides the teacher's logits; the student's where None."""
    schedule: Schedule = "grad_in_forward"
    """`head_loss` alone: "recompute" keeps hidden rows and some floats a row and makes the logits again in the backward
    pass, 12 T H V flops. "grad_in_forward" makes them once, 8 T H V flops, and keeps the gradients instead: [T, H] and
    [V, H] in float32 until the backward pass."""
    chunk_rows: int | None = None
    """Rows whose logits are held at a time; None for as many as fit `CPU_BYTES` or `CUDA_BYTES`."""
    tile_columns: int | None = None
    """Columns worked on at a time; None for a choice by device and schedule."""
    kernels: Kernels = "auto"
    """Elementwise work by Triton on CUDA where it is installed, or as stated."""
    reduce_hidden_grad: bool = True
    """Sum the gradient of the hidden rows over the tensor-parallel group. Otherwise it is this shard's part, and the
    caller sums, as sequence parallelism does with its reduce-scatter."""
    raises: bool = True
    """Raise `NumericsError` where a term is not finite. Otherwise it is returned as it is: the ranks that have it stay
    with the others, and the caller looks at the terms."""
    main_grad: bool = False
    """Add the matrix's gradient to ``weight.main_grad``, see `products.WeightGradient`."""

    def fitted(self, weight_VH: Tensor, vocab: VocabShard, free_bytes: int | None = None) -> HeadOptions:
        """Options whose `chunk_rows` fit the memory that is free now, the same on all ranks of `vocab.group`.

        A collective over that group, unless `chunk_rows` was given. `free_bytes` stands in for what is free.
        """
        if self.chunk_rows is not None:
            return self
        free = _free_bytes(weight_VH.device) if free_bytes is None else free_bytes
        budget = min(int(free * FREE_SHARE), default_bytes(weight_VH.device))
        rows = torch.tensor(_rows(self.schedule, weight_VH, budget), device=weight_VH.device)
        if vocab.ranks > 1:
            dist.all_reduce(rows, dist.ReduceOp.MIN, group=vocab.group)
        return replace(self, chunk_rows=int(rows))

    def sized(self, weight_VH: Tensor) -> HeadOptions:
        """Options with all sizes chosen, by device and columns alone. Not a collective."""
        columns, device = weight_VH.shape[0], weight_VH.device
        rows = self.chunk_rows or _rows(self.schedule, weight_VH, default_bytes(device))
        tile = self.tile_columns or tile_columns(self.schedule, columns, cuda=device.type == "cuda")
        return replace(self, chunk_rows=rows, tile_columns=max(tile, 1))


def default_bytes(device: torch.device) -> int:
    return CUDA_BYTES if device.type == "cuda" else CPU_BYTES


def tile_columns(schedule: Schedule, columns: int, *, cuda: bool) -> int:
    """Columns of a tile. On CUDA a tile is all columns, where these are held anyway: fewer, larger kernels."""
    if not cuda:
        return CPU_TILE
    return columns if schedule == "grad_in_forward" else 16384


def chunk_rows(schedule: Schedule, columns: int, budget: int, *, cuda: bool, width: int = 4) -> int:
    """Rows, a power of two, whose logits of student and teacher fit `budget` bytes, with a tile's scratch beside.

    `width`: bytes of a logit.
    """
    tile = min(columns, tile_columns(schedule, columns, cuda=cuda))
    held = 2 * columns if schedule == "grad_in_forward" else 0
    rows = budget // (width * (held + 5 * tile) or 1)
    most = MOST_ROWS if cuda else CPU_ROWS
    return max(LEAST_ROWS, min(most, 1 << max(rows, 1).bit_length() - 1))


def _rows(schedule: Schedule, weight_VH: Tensor, budget: int) -> int:
    width = 8 if weight_VH.dtype == torch.float64 else 4
    return chunk_rows(schedule, weight_VH.shape[0], budget, cuda=weight_VH.is_cuda, width=width)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
