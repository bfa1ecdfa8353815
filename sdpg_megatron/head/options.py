"""How a head is to be computed: everything that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from sdpg_megatron.head.divergences import Divergence, ReverseKL
from sdpg_megatron.head.shard import VocabShard
from sdpg_megatron.head.sizes import FREE_SHARE, HeadShape, Schedule

Kernels = Literal["auto", "torch", "triton"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """Options of `head_terms`, `head_loss`, `head_logprobs` and `logits_terms`; each reads those that concern it."""

    divergence: Divergence = field(default_factory=ReverseKL)
    """What `HeadTerms.divergence_T` is."""
    temperature: float = 1.0
    """Divides the student's logits."""
    teacher_temperature: float | None = None
    """Divides the teacher's logits; the student's where None."""
    schedule: Literal["auto"] | Schedule = "auto"
    """`head_loss` alone. "grad_in_forward" makes the logits once, 8 T H V flops, and keeps the gradients, [T, H] and
    [V, H] in float32, until the backward pass. "recompute" keeps hidden rows and some floats a row and makes the logits
    again in the backward pass, 12 T H V flops. "auto" is "grad_in_forward" unless `fitted` finds that its memory does
    not fit."""
    chunk_rows: int | None = None
    """Rows whose logits are held at a time where they have a teacher; twice as many where they have none, which is as
    many logits. None for what fits `sizes.CPU_BYTES` or `sizes.CUDA_BYTES`."""
    tile_columns: int | None = None
    """Columns worked on at a time; None for a choice by device and schedule."""
    group_rows: int | None = None
    """With "grad_in_forward": rows whose logit gradients are kept, in the weight's type, for one product that makes the
    weight's gradient. 0 replaces the logits by their gradients and multiplies tile by tile. None for 0 on a CPU, and
    for what the logits leave of `sizes.CUDA_BYTES` on a GPU."""
    kernels: Kernels = "auto"
    """Elementwise work by Triton on CUDA where it is installed, or as stated."""
    reduce_hidden_grad: bool = True
    """Sum the gradient of the hidden rows over the tensor-parallel group. Otherwise it is this shard's part, and the
    caller sums, as sequence parallelism does with its reduce-scatter."""
    raises: bool = True
    """Raise `NumericsError` where a term is not finite. Otherwise it is returned as it is: the ranks that have it stay
    with the others, and the caller looks at the terms."""
    main_grad: bool = False
    """Add the matrix's gradient to ``weight.main_grad``, see `gradients.WeightGradient`."""

    def fitted(self, weight_VH: Tensor, vocab: VocabShard, free_bytes: int | None = None) -> HeadOptions:
        """Options whose schedule and sizes fit the memory that is free now, the same on all ranks of `vocab.group`.

        "auto" becomes "grad_in_forward" where a chunk of `sizes.AUTO_ROWS` fits beside the weight's float32 gradient,
        else "recompute". A collective over the group, unless schedule and `chunk_rows` were given.

        Args:
            free_bytes: stands in for what is free.
        """
        if self.chunk_rows is not None and self.schedule != "auto":
            return self
        shape = self.shape(weight_VH)
        share = int((_free_bytes(weight_VH.device) if free_bytes is None else free_bytes) * FREE_SHARE)
        budgets: dict[Schedule, int] = {
            "grad_in_forward": min(share - shape.matrix_bytes, shape.default_bytes()),
            "recompute": min(share, shape.default_bytes()),
        }
        rows = {schedule: shape.chunk_rows(schedule, budget) for schedule, budget in budgets.items()}
        held = self.chunk_rows or rows["grad_in_forward"]
        group = shape.group_rows("grad_in_forward", budgets["grad_in_forward"], held)
        agreed = torch.tensor([*rows.values(), group], device=weight_VH.device)
        if vocab.ranks > 1:
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=vocab.group)
        in_forward, recomputed, group = agreed.tolist()
        fits = in_forward >= shape.auto_rows()
        schedule = ("grad_in_forward" if fits else "recompute") if self.schedule == "auto" else self.schedule
        chosen = in_forward if schedule == "grad_in_forward" else recomputed
        group = group if self.group_rows is None else self.group_rows
        return replace(self, schedule=schedule, chunk_rows=self.chunk_rows or chosen, group_rows=group)

    def sized(self, weight_VH: Tensor) -> HeadOptions:
        """Options with schedule and sizes chosen, by device and columns alone. Not a collective."""
        shape = self.shape(weight_VH)
        schedule = "grad_in_forward" if self.schedule == "auto" else self.schedule
        rows = self.chunk_rows or shape.chunk_rows(schedule, shape.default_bytes())
        group = self.group_rows
        if group is None or schedule == "recompute":
            group = shape.group_rows(schedule, shape.default_bytes(), rows)
        return replace(
            self,
            schedule=schedule,
            chunk_rows=rows,
            tile_columns=self.tile_columns or shape.tile_columns(schedule),
            group_rows=group,
        )

    def shape(self, weight_VH: Tensor) -> HeadShape:
        """Shape by which sizes for this weight are chosen."""
        return HeadShape(
            columns=weight_VH.shape[0],
            hidden=weight_VH.shape[1],
            cuda=weight_VH.is_cuda,
            logit_bytes=8 if weight_VH.dtype == torch.float64 else 4,
            gradient_bytes=weight_VH.element_size(),
            fused=self.uses_triton(weight_VH.device),
            top_k=self.divergence.top > 0,
        )

    def uses_triton(self, device: torch.device) -> bool:
        """True if the elementwise work is to be Triton's; with "triton" even if it is not installed."""
        return self.kernels == "triton" or (
            self.kernels == "auto" and device.type == "cuda" and find_spec("triton") is not None
        )


def _free_bytes(device: torch.device) -> int:
    """Memory that can be allocated now; on a GPU including the free blocks that torch's allocator caches."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)
