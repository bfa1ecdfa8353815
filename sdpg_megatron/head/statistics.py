"""Softmax statistics of rows of logits: measured on one shard's columns, joined over shards, read as terms.

With z the student's and u the teacher's logits over any subset of columns, a row is summed up by

    m = max z    S = sum e^(z-m)    B = sum e^(z-m) (z-m)              y = z[label], -inf where not among the columns
    n = max u    U = sum e^(u-n)    A = sum e^(z-m) [(z-m) - (u-n)]

Shapes: C rows of a chunk, G the rows among them with a teacher, V columns of the shard, R ranks.
`student_4C` holds m, S, B, y and `teacher_3G` holds n, U, A, in this order. They are float64, being but a few numbers a
row: beside a logit of 1e4, float32 has no digits left for ln S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

LEAST = -1000.0
"""Stands for every smaller log-weight, -inf included: e^-1000 is 0 in float64 too, and 0 times this is no NaN."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over columns, for some rows."""

    student_4C: Tensor
    teacher_3G: Tensor


@dataclass(frozen=True, slots=True)
class Terms:
    """What the statistics of the whole vocabulary say, in float64 nats."""

    logprob_C: Tensor
    entropy_C: Tensor
    divergence_G: Tensor


def student_statistics(logits_CV: Tensor, labels_C: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor]:
    """Statistics of the student's logits, which become z - m in place.

    Args:
        labels_C: column of each row's label in this shard; anything outside 0..V-1 is another shard's.
        entropy: without it B is left at 0.

    Returns:
        student_4C and e^(z-m) [C, V].
    """
    rows, columns = logits_CV.shape
    max_C = row_max(logits_CV)
    label_C = logits_CV.new_full((rows,), -torch.inf)
    if columns:
        owned_C, column_C = locate(labels_C, columns)
        label_C = torch.where(owned_C, logits_CV.gather(1, column_C[:, None])[:, 0], label_C)
    weight_CV = shift(logits_CV, max_C).exp()
    spread_C = (weight_CV * logits_CV).sum(1) if entropy else torch.zeros_like(max_C)
    return torch.stack((max_C, weight_CV.sum(1), spread_C, label_C)).double(), weight_CV


def teacher_statistics(logits_GV: Tensor, shifted_GV: Tensor, weight_GV: Tensor) -> Tensor:
    """teacher_3G of the teacher's logits (overwritten) against the student's z - m and e^(z-m) on the same rows."""
    max_G = row_max(logits_GV)
    logits_GV.sub_(max_G[:, None])
    sum_G = logits_GV.exp().sum(1)
    # Where p = 0 nothing is contributed, even if q = 0; where only q = 0 the divergence is infinite and must stay so.
    gap_GV = torch.sub(shifted_GV, logits_GV, out=logits_GV).masked_fill_(weight_GV == 0, 0)
    return torch.stack((max_G, sum_G, gap_GV.mul_(weight_GV).sum(1))).double()


def locate(labels_C: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which labels are among `columns` > 0 columns, and a valid column for every row: the label's own where it is."""
    return (labels_C >= 0) & (labels_C < columns), labels_C.clamp(0, columns - 1)


def row_max(logits_CV: Tensor) -> Tensor:
    """Largest logit of each row; the least finite number over no columns or where all are -inf."""
    least = torch.finfo(logits_CV.dtype).min
    if not logits_CV.shape[1]:
        return logits_CV.new_full((logits_CV.shape[0],), least)
    return logits_CV.amax(1).clamp_(min=least)


def shift(logits_CV: Tensor, max_C: Tensor) -> Tensor:
    """``logits - max`` in place, bounded below so that a column without weight yields 0 in every product."""
    return logits_CV.sub_(max_C[:, None]).clamp_(min=LEAST)


def gather_and_join(local: Statistics, rows_G: Tensor, group: ProcessGroup | None) -> Statistics:
    """Statistics of the whole vocabulary, with the same bits on every rank.

    One all-gather of 4 C + 3 G numbers; each rank then joins the same values in the same order.
    """
    if group is None or group.size() == 1:
        return local
    packed = torch.cat((local.student_4C.flatten(), local.teacher_3G.flatten()))
    ranks, students = group.size(), local.student_4C.numel()
    gathered_RN = packed.new_empty(ranks, packed.numel())
    dist.all_gather_into_tensor(gathered_RN.view(-1), packed, group=group)
    student_R4C = gathered_RN[:, :students].reshape(ranks, *local.student_4C.shape)
    teacher_R3G = gathered_RN[:, students:].reshape(ranks, *local.teacher_3G.shape)
    return join(student_R4C, teacher_R3G, rows_G)


def join(student_R4C: Tensor, teacher_R3G: Tensor, rows_G: Tensor) -> Statistics:
    """Bring the statistics of disjoint column sets to their common maxima and add them up.

    Args:
        rows_G: position in C of each row that has a teacher.
    """
    max_RC, sum_RC, spread_RC, label_RC = student_R4C.unbind(1)
    top_RG, teacher_sum_RG, gap_RG = teacher_R3G.unbind(1)
    max_C, top_G = max_RC.amax(0), top_RG.amax(0)
    shift_RC, teacher_shift_RG = max_RC - max_C, top_RG - top_G
    scale_RC, scale_RG = shift_RC.exp(), shift_RC.exp()[:, rows_G]
    moved_RG = scale_RG * (gap_RG + sum_RC[:, rows_G] * (shift_RC[:, rows_G] - teacher_shift_RG))
    # A shard whose student weights all vanish beside another's contributes 0, even if its own gap is infinite.
    moved_RG = moved_RG.masked_fill(scale_RG == 0, 0)
    student = (
        max_C,
        (scale_RC * sum_RC).sum(0),
        (scale_RC * (spread_RC + sum_RC * shift_RC)).sum(0),
        label_RC.amax(0),
    )
    teacher = (top_G, (teacher_shift_RG.exp() * teacher_sum_RG).sum(0), moved_RG.sum(0))
    return Statistics(torch.stack(student), torch.stack(teacher))


def read(statistics: Statistics, rows_G: Tensor) -> Terms:
    """log p(y) = y - m - ln S,  H = ln S - B/S,  KL = A/S - ln S + ln U."""
    max_C, sum_C, spread_C, label_C = statistics.student_4C
    _, teacher_sum_G, gap_G = statistics.teacher_3G
    log_sum_C = sum_C.log()
    return Terms(
        logprob_C=label_C - max_C - log_sum_C,
        entropy_C=log_sum_C - spread_C / sum_C,
        divergence_G=gap_G / sum_C[rows_G] - log_sum_C[rows_G] + teacher_sum_G.log(),
    )
