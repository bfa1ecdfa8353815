"""Row-wise float64 work between the passes over the logits, in plain torch. `rows_triton` launches one kernel for each.

Shapes: C rows, N numbers a row (statistics, see `statistics`, and what the divergence adds to them), k top tokens.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sdpg_megatron.head.divergences import Divergence, GradCoefficients, TopTokens
from sdpg_megatron.head.statistics import STUDENT, TAUGHT, StudentSums, TeacherSums, join
from sdpg_megatron.head.tile import RowCoefficients

__all__ = ["Coefficients", "Upstream", "coefficients", "join", "mixture_coefficients", "terms"]

Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of log-prob, entropy and divergence, each [C]; None for a term that the loss does not read."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Coefficients of the gradient in a chunk's logits."""

    row: RowCoefficients
    tokens_Ck: Tensor | None = None
    top_Ck: Tensor | None = None
    """To be added at the columns of these tokens."""


def terms(sums_NC: Tensor, divergence: Divergence, out_4C: Tensor) -> None:
    """Write log p(y), H, divergence and log q(y) to `out_4C`; the last two are 0 for rows without a teacher."""
    student = StudentSums.of(sums_NC)
    out_4C[0], out_4C[1] = student.logprob, student.entropy
    if sums_NC.shape[0] == STUDENT:
        out_4C[2:].zero_()
        return
    teacher = TeacherSums.of(sums_NC)
    out_4C[2], out_4C[3] = divergence.value(student, teacher, sums_NC[TAUGHT:]), teacher.logprob


def coefficients(
    sums_NC: Tensor, divergence: Divergence, upstream: Upstream, temperature: float, dtype: torch.dtype
) -> Coefficients:
    """Coefficients, in `dtype`, of the gradient in the logits before temperature, from gradients of the terms."""
    logprob_C, entropy_C, divergence_C = (None if g_C is None else g_C.double() for g_C in upstream)
    student = StudentSums.of(sums_NC)
    contributions: list[GradCoefficients] = []
    if logprob_C is not None:
        contributions.append(GradCoefficients(-logprob_C / student.sum, label=logprob_C))
    if entropy_C is not None:
        slope_C = -entropy_C / student.sum
        contributions.append(GradCoefficients(-slope_C * student.weighted_logit_sum / student.sum, student=slope_C))
    teacher = None
    if sums_NC.shape[0] > STUDENT and divergence_C is not None:
        teacher = TeacherSums.of(sums_NC)
        contributions.append(divergence.grad_coefficients(student, teacher, sums_NC[TAUGHT:], divergence_C))

    def total(name: str) -> Tensor | None:
        parts = [part for contribution in contributions if (part := getattr(contribution, name)) is not None]
        if not parts:
            return None
        sum_C: Tensor = reduce(operator.add, parts)
        return (sum_C if temperature == 1 else sum_C / temperature).to(dtype)

    parts = {name: total(name) for name in ("constant", "label", "student", "teacher", "teacher_weight", "mixture")}
    if parts["constant"] is None:
        parts["constant"] = torch.zeros_like(student.max, dtype=dtype)
    if teacher is not None and any(parts[name] is not None for name in ("teacher", "teacher_weight", "mixture")):
        parts["teacher_max"] = teacher.max.to(dtype)
    if teacher is not None and parts["mixture"] is not None:
        parts |= {"log_sum": student.log_sum.to(dtype), "teacher_log_sum": teacher.log_sum.to(dtype)}
    student_mix = 0.5 if divergence.student_mix is None else divergence.student_mix
    row = RowCoefficients(max=student.max.to(dtype), student_mix=student_mix, **parts)  # type: ignore[arg-type]
    top_Ck = total("top_Ck")
    return Coefficients(row, None if top_Ck is None else TopTokens.unpacked(sums_NC[TAUGHT:]).token_Ck.long(), top_Ck)


def mixture_coefficients(sums_KC: Tensor, student_mix: float, dtype: torch.dtype) -> RowCoefficients:
    """Coefficients that `tile.measure_mixture` reads."""
    student, teacher = StudentSums.of(sums_KC), TeacherSums.of(sums_KC)
    return RowCoefficients(
        max=student.max.to(dtype),
        constant=student.max,
        teacher_max=teacher.max.to(dtype),
        log_sum=student.log_sum.to(dtype),
        teacher_log_sum=teacher.log_sum.to(dtype),
        student_mix=student_mix,
    )
