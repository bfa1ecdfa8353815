"""Elementwise work on one tile of logits, in plain torch. `tile_triton` does the same with fewer memory reads.

With z the student's and u the teacher's logits of a tile's columns, both over temperature, a row's statistics are

    m = max z    S = sum e^(z-m)    B = sum e^(z-m) (z-m)    y = z[label], or -inf if the label is in other columns
    n = max u    U = sum e^(u-n)    D, see below             x = u[label], or -inf if the label is in other columns

with D = sum e^(z-m) [(z-m) - (u-n)] (`WeightedLogRatio.STUDENT`) or sum e^(u-n) [(u-n) - (z-m)]
(`WeightedLogRatio.TEACHER`). In code: max, sum, weighted_logit_sum (B), label, and weighted_log_ratio (D).

Shapes: C rows, V columns of a tile. Sums over a tile are computed in the logits' type (float32 or float64) and returned
in float64: beside a logit of 1e4, float32 has no digits left for ln S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

LEAST = -1000.0
"""Lower bound of log-weights; replaces -inf. e^-1000 is 0 in float64 too, and 0 times this is 0 instead of NaN."""


class WeightedLogRatio(Enum):
    """Distribution that weights the log ratio in D; NONE: D is not computed."""

    NONE = 0
    STUDENT = 1
    TEACHER = 2


@dataclass(frozen=True, slots=True)
class RowCoefficients:
    """Coefficients of the logit gradient, each [C]. The gradient in column v is

        e^(z-m) [constant + student (z-m) + teacher (u-n) + mixture (log p - log M)]
        - teacher_weight e^(u-n) + label 1[v = y]

    with log M = log(student_mix p + (1 - student_mix) q). A coefficient that is None is skipped at no cost. Maxima and
    sums are over the whole vocabulary.
    """

    max: Tensor
    """m."""
    constant: Tensor
    label: Tensor | None = None
    student: Tensor | None = None
    teacher_max: Tensor | None = None
    """n."""
    teacher: Tensor | None = None
    teacher_weight: Tensor | None = None
    mixture: Tensor | None = None
    log_sum: Tensor | None = None
    """ln S; read with `mixture` only."""
    teacher_log_sum: Tensor | None = None
    """ln U; read with `mixture` only."""
    student_mix: float = 0.5
    """The student's weight in the mixture; read with `mixture` only."""


def measure(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    weighted_log_ratio: WeightedLogRatio,
    *,
    masked: bool,
) -> Tensor:
    """Compute the statistics of a tile. The tile is not changed.

    Args:
        labels_C: column of each row's label in this tile; a value outside 0..V-1 if another tile holds it.
        masked: the logits may hold -inf.

    Returns:
        float64: (m, S, B, y) [4, C], or with a teacher (m, S, B, y, n, U, D, x) [8, C]. D is +inf if a token has a
        weight > 0 in the distribution that weights the log ratio and a logit of -inf in the other. D is 0 with
        `WeightedLogRatio.NONE`.
    """
    max_C = _row_max(student_CV)
    shifted_CV = _shift(student_CV, max_C, masked)
    weight_CV = shifted_CV.exp()
    found = [max_C, weight_CV.sum(1), _dot(weight_CV, shifted_CV), _at(student_CV, labels_C)]
    if teacher_CV is not None:
        top_C = _row_max(teacher_CV)
        # No lower bound here: the log ratio must stay infinite where only one distribution has weight 0.
        lower_CV = teacher_CV - top_C[:, None]
        teacher_weight_CV = lower_CV.exp()
        match weighted_log_ratio:
            case WeightedLogRatio.STUDENT:
                log_ratio_C = _weighted_log_ratio(weight_CV, shifted_CV, lower_CV, masked)
            case WeightedLogRatio.TEACHER:
                shifted_CV = student_CV - max_C[:, None] if masked else shifted_CV
                log_ratio_C = _weighted_log_ratio(teacher_weight_CV, lower_CV, shifted_CV, masked)
            case WeightedLogRatio.NONE:
                log_ratio_C = torch.zeros_like(top_C)
        found += [top_C, teacher_weight_CV.sum(1), log_ratio_C, _at(teacher_CV, labels_C)]
    return torch.stack(found).double()


def measure_mixture(student_CV: Tensor, teacher_CV: Tensor, row: RowCoefficients, *, masked: bool) -> Tensor:
    """Contribution of a tile to KL(p || M) and KL(q || M), float64 [2, C]. The tile is not changed.

    M = student_mix p + (1 - student_mix) q.

    Args:
        row: `max`, `log_sum`, `teacher_max`, `teacher_log_sum` and `student_mix` are read.
    """
    logp_CV, logq_CV, logm_CV = _mixture(student_CV, teacher_CV, row, masked)
    found = _dot(logp_CV.exp(), logp_CV - logm_CV), _dot(logq_CV.exp(), logq_CV - logm_CV)
    return torch.stack(found).double()


def gradient_(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    row: RowCoefficients,
    *,
    masked: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of `RowCoefficients`, rounded into `out` if given, else in the student's tile.

    Both tiles are overwritten. Other arguments: see `measure`.
    """
    kind = student_CV.dtype
    mixed_CV = _mixture_part(student_CV, teacher_CV, row, masked)
    gradient_CV = _shift(student_CV, row.max, masked, out=student_CV)
    weight_CV = gradient_CV.exp()
    if teacher_CV is not None and row.teacher_max is not None:
        torch.sub(teacher_CV, _column(row.teacher_max, kind), out=teacher_CV)
        if masked:
            # Where `row.teacher` is read, q = 0 implies p = 0 (else D is infinite): any finite number times p is 0.
            torch.nan_to_num(teacher_CV, nan=torch.nan, posinf=torch.inf, neginf=LEAST, out=teacher_CV)
    if row.student is None:
        gradient_CV.copy_(_column(row.constant, kind).expand_as(gradient_CV))
    else:
        gradient_CV.mul_(_column(row.student, kind)).add_(_column(row.constant, kind))
    if row.teacher is not None:
        gradient_CV.addcmul_(_given(teacher_CV), _column(row.teacher, kind))
    if mixed_CV is not None:
        gradient_CV.add_(mixed_CV)
    gradient_CV.mul_(weight_CV)
    if row.teacher_weight is not None:
        gradient_CV.addcmul_(_given(teacher_CV).exp_(), _column(row.teacher_weight, kind), value=-1)
    if row.label is not None and gradient_CV.shape[1]:
        owned_C, column_C = locate(labels_C, gradient_CV.shape[1])
        at_label_C = torch.where(owned_C, row.label.to(kind), 0)
        gradient_CV.scatter_add_(1, column_C[:, None], at_label_C[:, None])
    return gradient_CV if out is None else out.copy_(gradient_CV)


def locate(labels_C: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Mask of labels inside `columns` > 0 columns, and labels clamped to a valid column."""
    return (labels_C >= 0) & (labels_C < columns), labels_C.clamp(0, columns - 1)


def _row_max(logits_CV: Tensor) -> Tensor:
    """Largest logit of each row; the lowest finite number if there are no columns or all logits are -inf."""
    least = torch.finfo(logits_CV.dtype).min
    if not logits_CV.shape[1]:
        return logits_CV.new_full((logits_CV.shape[0],), least)
    return logits_CV.amax(1).clamp_(min=least)


def _column(row_C: Tensor, kind: torch.dtype) -> Tensor:
    return row_C.to(kind)[:, None]


def _given(tile_CV: Tensor | None) -> Tensor:
    assert tile_CV is not None, "the coefficients need a teacher"
    return tile_CV


def _shift(logits_CV: Tensor, max_C: Tensor, masked: bool, out: Tensor | None = None) -> Tensor:
    """``logits - max``. With `masked`, clamped to `LEAST`, so that a column of weight 0 yields 0 instead of NaN."""
    shifted_CV = torch.sub(logits_CV, _column(max_C, logits_CV.dtype), out=out)
    return shifted_CV.clamp_(min=LEAST) if masked else shifted_CV


def _dot(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    dots_C: Tensor = torch.linalg.vecdot(left_CV, right_CV)
    return dots_C


def _at(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Logit of the label; -inf if the label is not among the columns."""
    rows, columns = logits_CV.shape
    nowhere_C = logits_CV.new_full((rows,), -torch.inf)
    if not columns:
        return nowhere_C
    owned_C, column_C = locate(labels_C, columns)
    return torch.where(owned_C, logits_CV.gather(1, column_C[:, None])[:, 0], nowhere_C)


def _weighted_log_ratio(weight_CV: Tensor, over_CV: Tensor, under_CV: Tensor, masked: bool) -> Tensor:
    """Sum of ``weight (over - under)``. A column of weight 0 adds 0, even if the difference is infinite."""
    log_ratio_CV = over_CV - under_CV
    return _dot(weight_CV, log_ratio_CV.masked_fill_(weight_CV == 0, 0) if masked else log_ratio_CV)


def _mixture(
    student_CV: Tensor, teacher_CV: Tensor, row: RowCoefficients, masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and log M, each [C, V]."""
    kind = student_CV.dtype
    logp_CV = _shift(student_CV, row.max, masked).sub_(_column(_given(row.log_sum), kind))
    logq_CV = _shift(teacher_CV, _given(row.teacher_max), masked).sub_(_column(_given(row.teacher_log_sum), kind))
    return (
        logp_CV,
        logq_CV,
        torch.logaddexp(logp_CV + math.log(row.student_mix), logq_CV + math.log1p(-row.student_mix)),
    )


def _mixture_part(student_CV: Tensor, teacher_CV: Tensor | None, row: RowCoefficients, masked: bool) -> Tensor | None:
    if row.mixture is None:
        return None
    logp_CV, _, logm_CV = _mixture(student_CV, _given(teacher_CV), row, masked)
    return logp_CV.sub_(logm_CV).mul_(_column(row.mixture, student_CV.dtype))
