"""Per-row float64 work between the passes over the logits, in plain torch. `rows_triton` has a kernel per function.

Shapes: C rows; N numbers per row: its statistics (see `statistics`), then any extra numbers of its divergence; k top
tokens.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sdpg_megatron.head.divergences import Divergence, GradCoefficients, TopTokens
from sdpg_megatron.head.statistics import NUM_STUDENT_SUMS, NUM_SUMS_WITH_TEACHER, StudentSums, TeacherSums, join
from sdpg_megatron.head.tile import RowCoefficients

__all__ = ["Coefficients", "Upstream", "coefficients", "join", "mixture_coefficients", "terms"]

Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of the loss in log-prob, entropy and divergence, each [C]; None for a term that the loss does not read."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Coefficients of the logit gradient of a chunk."""

    row: RowCoefficients
    tokens_Ck: Tensor | None = None
    """Token ids of the student's top k, for `TopK`."""
    top_Ck: Tensor | None = None
    """Added at the columns of these tokens."""


def terms(sums_NC: Tensor, divergence: Divergence, out_4C: Tensor) -> None:
    """Write log p(y), H, divergence and log q(y) to `out_4C`. The last two are 0 for rows without a teacher."""
    student = StudentSums.of(sums_NC)
    out_4C[0], out_4C[1] = student.logprob, student.entropy
    if sums_NC.shape[0] == NUM_STUDENT_SUMS:
        out_4C[2:].zero_()
        return
    teacher = TeacherSums.of(sums_NC)
    out_4C[2], out_4C[3] = divergence.value(student, teacher, sums_NC[NUM_SUMS_WITH_TEACHER:]), teacher.logprob


def coefficients(
    sums_NC: Tensor, divergence: Divergence, upstream: Upstream, temperature: float, dtype: torch.dtype
) -> Coefficients:
    """Coefficients, in `dtype`, of the gradient in the logits before temperature, from upstream gradients."""
    logprob_C, entropy_C, divergence_C = (None if g_C is None else g_C.double() for g_C in upstream)
    student = StudentSums.of(sums_NC)
    contributions: list[GradCoefficients] = []
    if logprob_C is not None:
        contributions.append(GradCoefficients(-logprob_C / student.sum, label=logprob_C))
    if entropy_C is not None:
        slope_C = -entropy_C / student.sum
        contributions.append(GradCoefficients(-slope_C * student.weighted_logit_sum / student.sum, student=slope_C))
    teacher = None
    if sums_NC.shape[0] > NUM_STUDENT_SUMS and divergence_C is not None:
        teacher = TeacherSums.of(sums_NC)
        contributions.append(
            divergence.grad_coefficients(student, teacher, sums_NC[NUM_SUMS_WITH_TEACHER:], divergence_C)
        )

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
    row = RowCoefficients(max=student.max.to(dtype), student_mix=student_mix(divergence), **parts)  # type: ignore[arg-type]
    if (top_Ck := total("top_Ck")) is None:
        return Coefficients(row)
    tokens = TopTokens.unpacked(sums_NC[NUM_SUMS_WITH_TEACHER:])
    return Coefficients(row, tokens.token_Ck.long(), top_Ck)


def student_mix(divergence: Divergence) -> float:
    """The student's weight in the mixture; any value for a divergence without one."""
    return 0.5 if divergence.student_mix is None else divergence.student_mix


def mixture_coefficients(sums_KC: Tensor, student_mix: float, dtype: torch.dtype) -> RowCoefficients:
    """Coefficients for `tile.measure_mixture`."""
    student, teacher = StudentSums.of(sums_KC), TeacherSums.of(sums_KC)
    return RowCoefficients(
        max=student.max.to(dtype),
        constant=student.max,
        teacher_max=teacher.max.to(dtype),
        log_sum=student.log_sum.to(dtype),
        teacher_log_sum=teacher.log_sum.to(dtype),
        student_mix=student_mix,
    )
