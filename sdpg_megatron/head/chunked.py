"""The head in plain torch: a few rows of logits at a time, made again in the backward pass.

Shapes: T rows, C rows of a chunk, G rows with a teacher, V columns of the shard (its tokens only), H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpg_megatron.head.gradient import divergence_gradient, student_gradient
from sdpg_megatron.head.shard import VocabShard
from sdpg_megatron.head.statistics import (
    Statistics,
    gather_and_join,
    read,
    student_statistics,
    teacher_statistics,
)

Upstream = tuple[Tensor | None, ...]
"""Gradients [T] of log-prob, entropy and divergence; None for a term that nobody used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """The options of a head that are not tensors; `head_terms` explains them."""

    vocab: VocabShard
    temperature: float
    teacher_temperature: float
    chunk_rows: int
    reduce_hidden_grad: bool = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of rows and the teacher's rows among them."""

    rows: slice
    picks_G: Tensor
    """Which of the teacher's rows."""
    rows_G: Tensor
    """Their positions within the chunk."""


class ChunkedLogits:
    """Student and teacher logits of any chunk of rows, and what the head measures on them."""

    def __init__(
        self, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, teacher_GH: Tensor, rows_G: Tensor, plan: HeadPlan
    ) -> None:
        self.dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        self.plan = plan
        self.hidden_TH = hidden_TH
        # One cast for all chunks: products of narrow floats would round every logit to that type.
        self.weight_VH = plan.vocab.tokens(weight_VH).to(self.dtype)
        self.labels_T = labels_T - plan.vocab.start
        self.teacher_GH = teacher_GH
        self.rows_G = rows_G

    def chunks(self) -> Iterator[Chunk]:
        """The rows in runs of `plan.chunk_rows`."""
        total, size = self.hidden_TH.shape[0], self.plan.chunk_rows
        sorted_G, order_G = self.rows_G.sort()
        starts = range(0, total, size)
        bounds = torch.searchsorted(sorted_G, torch.tensor([*starts, total], device=sorted_G.device)).tolist()
        for start, (low, high) in zip(starts, pairwise(bounds), strict=True):
            yield Chunk(slice(start, start + size), order_G[low:high], sorted_G[low:high] - start)

    def student_CH(self, chunk: Chunk) -> Tensor:
        """Hidden rows over temperature, which is cheaper to divide by here than in the logits."""
        return self.hidden_TH[chunk.rows].to(self.dtype) / self.plan.temperature

    def teacher_GV(self, chunk: Chunk) -> Tensor:
        """The teacher's logits, over temperature."""
        teacher_GH = self.teacher_GH[chunk.picks_G].to(self.dtype) / self.plan.teacher_temperature
        return teacher_GH @ self.weight_VH.T

    def measure(self, *, entropy: bool) -> Statistics:
        """Statistics of all rows over the whole vocabulary: student's [4, T], teacher's [3, G]."""
        student_4T = self.hidden_TH.new_empty((4, self.hidden_TH.shape[0]), dtype=torch.float64)
        teacher_3G = self.hidden_TH.new_empty((3, self.rows_G.numel()), dtype=torch.float64)
        for chunk in self.chunks():
            whole = gather_and_join(self._measure_shard(chunk, entropy), chunk.rows_G, self.plan.vocab.group)
            student_4T[:, chunk.rows] = whole.student_4C
            teacher_3G[:, chunk.picks_G] = whole.teacher_3G
        return Statistics(student_4T, teacher_3G)

    def _measure_shard(self, chunk: Chunk, entropy: bool) -> Statistics:
        logits_CV = self.student_CH(chunk) @ self.weight_VH.T
        student_4C, weight_CV = student_statistics(logits_CV, self.labels_T[chunk.rows], entropy=entropy)
        if not chunk.picks_G.numel():
            return Statistics(student_4C, student_4C.new_empty((3, 0)))
        shifted_GV, weight_GV = logits_CV[chunk.rows_G], weight_CV[chunk.rows_G]
        return Statistics(student_4C, teacher_statistics(self.teacher_GV(chunk), shifted_GV, weight_GV))

    def gradient_CV(self, chunk: Chunk, student_CH: Tensor, whole: Statistics, upstream: Upstream) -> Tensor:
        """Gradient of a chunk in its logits ``student_CH @ weight_VH.T``; `whole` are the statistics of all rows."""
        logits_CV = student_CH @ self.weight_VH.T
        student_4C = whole.student_4C[:, chunk.rows]
        logprob_C, entropy_C, divergence_C = (None if g_T is None else g_T[chunk.rows] for g_T in upstream)
        gradient_CV, weight_CV = student_gradient(
            logits_CV, self.labels_T[chunk.rows], student_4C, logprob_grad_C=logprob_C, entropy_grad_C=entropy_C
        )
        if divergence_C is not None and chunk.picks_G.numel():
            rows_G = chunk.rows_G
            part_GV = divergence_gradient(
                self.teacher_GV(chunk),
                logits_CV[rows_G],
                weight_CV[rows_G],
                sum_G=student_4C[1, rows_G],
                teacher_3G=whole.teacher_3G[:, chunk.picks_G],
                divergence_grad_G=divergence_C[rows_G],
            )
            gradient_CV.index_add_(0, rows_G, part_GV)
        return gradient_CV


def token_terms(statistics: Statistics, rows_G: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y), H and KL of every row, each [T] in `dtype`; KL is 0 on rows without a teacher."""
    terms = read(statistics, rows_G)
    divergence_T = torch.zeros_like(terms.logprob_C).index_copy_(0, rows_G, terms.divergence_G)
    return terms.logprob_C.to(dtype), terms.entropy_C.to(dtype), divergence_T.to(dtype)


class ChunkedHead(torch.autograd.Function):
    """(hidden_TH, weight_VH, labels_T, teacher_GH, rows_G, plan) -> (logprob_T, entropy_T, divergence_T)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        teacher_GH: Tensor,
        rows_G: Tensor,
        plan: HeadPlan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = ChunkedLogits(hidden_TH, weight_VH, labels_T, teacher_GH, rows_G, plan)
        whole = logits.measure(entropy=True)
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, teacher_GH, rows_G, whole.student_4C, whole.teacher_3G)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return token_terms(whole, rows_G, logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, teacher_GH, rows_G, student_4T, teacher_3G = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        plan: HeadPlan = ctx.plan
        logits = ChunkedLogits(hidden_TH, weight_VH, labels_T, teacher_GH, rows_G, plan)
        whole = Statistics(student_4T, teacher_3G)
        hidden_grad_TH = torch.zeros_like(hidden_TH, dtype=logits.dtype) if wants_hidden else None
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=logits.dtype) if wants_weight else None
        # A shard of padding alone has nothing to add, yet takes part in the reduction below.
        for chunk in logits.chunks() if logits.weight_VH.shape[0] else ():
            student_CH = logits.student_CH(chunk)
            gradient_CV = logits.gradient_CV(chunk, student_CH, whole, upstream)
            if hidden_grad_TH is not None:
                hidden_grad_TH[chunk.rows] = (gradient_CV @ logits.weight_VH).div_(plan.temperature)
            if weight_grad_VH is not None:
                plan.vocab.tokens(weight_grad_VH).addmm_(gradient_CV.T, student_CH)
        if hidden_grad_TH is not None:
            if plan.reduce_hidden_grad and plan.vocab.ranks > 1:
                dist.all_reduce(hidden_grad_TH, group=plan.vocab.group)
            hidden_grad_TH = hidden_grad_TH.to(hidden_TH.dtype)
        if weight_grad_VH is not None:
            weight_grad_VH = weight_grad_VH.to(weight_VH.dtype)
        return hidden_grad_TH, weight_grad_VH, None, None, None, None
