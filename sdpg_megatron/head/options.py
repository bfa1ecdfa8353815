"""Options of the head: everything that is not a tensor."""

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
    """Options of `head_terms`, `head_loss`, `head_logprobs` and `logits_terms`. Each reads the ones that apply."""

    divergence: Divergence = field(default_factory=ReverseKL)
    """Divergence in `HeadTerms.divergence_T`."""
    temperature: float = 1.0
    """Divides the student's logits."""
    teacher_temperature: float | None = None
    """Divides the teacher's logits. None: `temperature`."""
    schedule: Literal["auto"] | Schedule = "auto"
    """Read by `head_loss` only. "grad_in_forward" computes the logits once, 8 T H V flops, and keeps the gradients
    [T, H] and [V, H] in float32 until the backward pass. "recompute" keeps the hidden rows and some floats per row, and
    computes the logits again in the backward pass, 12 T H V flops. "auto" is "grad_in_forward", unless `fitted` finds
    that its memory does not fit."""
    chunk_rows: int | None = None
    """Rows with a teacher whose logits are in memory at a time. Chunks without a teacher have twice the rows, hence the
    same number of logits. None: the largest size that fits `sizes.CPU_BYTES` or `sizes.CUDA_BYTES`."""
    tile_columns: int | None = None
    """Columns of a tile. None: chosen by device and schedule."""
    group_rows: int | None = None
    """With "grad_in_forward": rows whose logit gradients are kept, in the weight's type, for one product of the weight
    gradient. 0: gradients overwrite the logits and are multiplied tile by tile. None: 0 on a CPU; on a GPU the rows
    that fit `sizes.CUDA_BYTES` besides the logits."""
    kernels: Kernels = "auto"
    """Implementation of the elementwise work. "auto": Triton on CUDA if it is installed, else torch."""
    reduce_hidden_grad: bool = True
    """All-reduce the gradient of the hidden rows over the tensor-parallel group. False: return this shard's partial
    gradient; the caller sums it, as sequence parallelism does with its reduce-scatter."""
    raises: bool = True
    """Raise `NumericsError` if a term is not finite. False: return non-finite terms, so that a rank does not leave the
    collectives alone; the caller checks them."""
    main_grad: bool = False
    """Add the weight gradient to ``weight.main_grad``, see `gradients.WeightGradient`."""

    @property
    def temperatures(self) -> tuple[float, float]:
        """Temperatures of student and teacher."""
        teacher = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        return self.temperature, teacher

    def fitted(self, weight_VH: Tensor, vocab: VocabShard, free_bytes: int | None = None) -> HeadOptions:
        """Choose schedule and sizes that fit the free memory, the same on all ranks of `vocab.group`.

        "auto" becomes "grad_in_forward" if a chunk of `sizes.AUTO_ROWS` fits besides the weight's float32 gradient,
        else "recompute". Collective over the group, unless schedule and `chunk_rows` are given.

        Args:
            free_bytes: overrides the measured free memory.
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
        """Choose the unset schedule and sizes by device and columns only. Not collective."""
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
        """`HeadShape` of this weight, from which sizes are chosen."""
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
        """True if Triton does the elementwise work. With "triton", also if it is not installed."""
        return self.kernels == "triton" or (
            self.kernels == "auto" and device.type == "cuda" and find_spec("triton") is not None
        )


def _free_bytes(device: torch.device) -> int:
    """Free memory in bytes. On a GPU it includes the free blocks in torch's caching allocator."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)
