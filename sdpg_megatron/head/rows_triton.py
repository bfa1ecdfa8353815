"""The functions of `rows` as Triton kernels: one launch each instead of about twenty.

Arguments and results: see `rows`. Symbols: see `tile`. A divergence without a kernel `Form` falls back to `rows`.

Shapes: C rows of a chunk or of a program's block, R sets of columns, K statistics, N numbers per row, P `PARTS`.
"""
# Type checkers do not understand Triton kernels; all other functions here are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpg_megatron.head import rows
from sdpg_megatron.head.divergences import Divergence, Form
from sdpg_megatron.head.rows import Coefficients, Upstream
from sdpg_megatron.head.statistics import NUM_STUDENT_SUMS
from sdpg_megatron.head.tile import RowCoefficients, WeightedLogRatio
from sdpg_megatron.head.tile_triton import device_of

BLOCK = 128
"""Rows per program."""

_STUDENT = tl.constexpr(WeightedLogRatio.STUDENT.value)
_TEACHER = tl.constexpr(WeightedLogRatio.TEACHER.value)
_NONE = tl.constexpr(Form.NONE.value)
_REVERSE_KL = tl.constexpr(Form.REVERSE_KL.value)
_FORWARD_KL = tl.constexpr(Form.FORWARD_KL.value)
_JENSEN_SHANNON = tl.constexpr(Form.JENSEN_SHANNON.value)
_SAMPLED_TOKEN = tl.constexpr(Form.SAMPLED_TOKEN.value)

PARTS = (
    *("max", "constant", "label", "student"),
    *("teacher_max", "teacher", "teacher_weight", "mixture", "log_sum", "teacher_log_sum"),
)
"""Fields of `RowCoefficients`, in the output order of `_coefficients`."""
OF_FORM = {
    Form.NONE: set(),
    Form.REVERSE_KL: {"student", "teacher_max", "teacher"},
    Form.FORWARD_KL: {"teacher_max", "teacher_weight"},
    Form.JENSEN_SHANNON: {"teacher_max", "mixture", "log_sum", "teacher_log_sum"},
    Form.SAMPLED_TOKEN: {"label"},
}
"""Fields that a divergence with an upstream gradient needs besides `max` and `constant`."""


def join(parts_RKC: Tensor, weighted_log_ratio: WeightedLogRatio) -> Tensor:
    """`statistics.join`."""
    ranks, kinds, size = parts_RKC.shape
    if ranks == 1 or not size:
        return rows.join(parts_RKC, weighted_log_ratio)
    joined_KC = parts_RKC.new_empty(kinds, size)
    with device_of(parts_RKC):
        _join[_grid(size)](
            parts_RKC,
            joined_KC,
            ranks,
            size,
            parts_RKC.stride(0),
            HAS_TEACHER=kinds > NUM_STUDENT_SUMS,
            LOG_RATIO_WEIGHT=weighted_log_ratio.value,
            BLOCK=BLOCK,
        )
    return joined_KC


def terms(sums_NC: Tensor, divergence: Divergence, out_4C: Tensor) -> None:
    """`rows.terms`."""
    has_teacher, size = sums_NC.shape[0] > NUM_STUDENT_SUMS, sums_NC.shape[1]
    if has_teacher and divergence.form is Form.NONE:
        rows.terms(sums_NC, divergence, out_4C)
        return
    with device_of(sums_NC):
        _terms[_grid(size)](
            sums_NC,
            out_4C,
            size,
            out_4C.stride(0),
            FORM=divergence.form.value if has_teacher else None,
            STUDENT_MIX=rows.student_mix(divergence),
            BLOCK=BLOCK,
        )


def coefficients(
    sums_NC: Tensor, divergence: Divergence, upstream: Upstream, temperature: float, dtype: torch.dtype
) -> Coefficients:
    """`rows.coefficients`."""
    logprob_C, entropy_C, divergence_C = upstream
    size = sums_NC.shape[1]
    form = Form.NONE
    if sums_NC.shape[0] == NUM_STUDENT_SUMS:
        divergence_C = None
    elif divergence_C is not None:
        form = divergence.form
        if form is Form.NONE:
            return rows.coefficients(sums_NC, divergence, upstream, temperature, dtype)
    made_PC = sums_NC.new_empty(len(PARTS), size, dtype=dtype)
    with device_of(sums_NC):
        _coefficients[_grid(size)](
            sums_NC,
            *(None if g_C is None else g_C.contiguous() for g_C in (logprob_C, entropy_C, divergence_C)),
            made_PC,
            size,
            FORM=form.value,
            STUDENT_MIX=rows.student_mix(divergence),
            INV_TEMPERATURE=1 / temperature,
            BLOCK=BLOCK,
        )
    wanted = {"max", "constant", *OF_FORM[form]}
    wanted |= ({"label"} if logprob_C is not None else set()) | ({"student"} if entropy_C is not None else set())
    parts = {name: part_C for name, part_C in zip(PARTS, made_PC.unbind(0), strict=True) if name in wanted}
    return Coefficients(RowCoefficients(**parts, student_mix=rows.student_mix(divergence)))


def _grid(size: int) -> tuple[int]:
    return (triton.cdiv(size, BLOCK),)


# --- device functions


@triton.jit
def _number(sums_NC, index, size, row_C, inside_C):
    """Load one number per row; 1 past the last row, which is valid in every formula."""
    return tl.load(sums_NC + index * size + row_C, mask=inside_C, other=1.0)


@triton.jit
def _gradient(upstream_C, row_C, inside_C):
    return tl.load(upstream_C + row_C, mask=inside_C, other=0.0).to(tl.float64)


@triton.jit
def _part(parts_RKC, rank, index, rank_stride, size, row_C, inside_C):
    return tl.load(parts_RKC + rank * rank_stride + index * size + row_C, mask=inside_C, other=1.0)


# --- kernels


@triton.jit(do_not_specialize=["size", "rank_stride"])
def _join(
    parts_RKC,
    joined_KC,
    ranks,
    size,
    rank_stride,
    HAS_TEACHER: tl.constexpr,
    LOG_RATIO_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rescale the statistics of all sets of columns to their common maxima and add them in order."""
    row_C = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_C = row_C < size
    max_C = tl.full((BLOCK,), float("-inf"), tl.float64)
    label_C, teacher_max_C, teacher_label_C = max_C, max_C, max_C
    for rank in range(ranks):
        max_C = tl.maximum(max_C, _part(parts_RKC, rank, 0, rank_stride, size, row_C, inside_C))
        # tl.maximum drops NaN, but the result stays non-finite: the sets without the label have -inf.
        label_C = tl.maximum(label_C, _part(parts_RKC, rank, 3, rank_stride, size, row_C, inside_C))
        if HAS_TEACHER:
            teacher_max_C = tl.maximum(teacher_max_C, _part(parts_RKC, rank, 4, rank_stride, size, row_C, inside_C))
            teacher_label_C = tl.maximum(teacher_label_C, _part(parts_RKC, rank, 7, rank_stride, size, row_C, inside_C))
    sum_C = tl.zeros((BLOCK,), tl.float64)
    logit_sum_C, teacher_sum_C, log_ratio_C = sum_C, sum_C, sum_C
    for rank in range(ranks):
        part_sum_C = _part(parts_RKC, rank, 1, rank_stride, size, row_C, inside_C)
        part_logit_sum_C = _part(parts_RKC, rank, 2, rank_stride, size, row_C, inside_C)
        shift_C = _part(parts_RKC, rank, 0, rank_stride, size, row_C, inside_C) - max_C
        scale_C = tl.exp(shift_C)
        sum_C += scale_C * part_sum_C
        logit_sum_C += scale_C * (part_logit_sum_C + part_sum_C * shift_C)
        if HAS_TEACHER:
            part_teacher_C = _part(parts_RKC, rank, 5, rank_stride, size, row_C, inside_C)
            part_log_ratio_C = _part(parts_RKC, rank, 6, rank_stride, size, row_C, inside_C)
            teacher_shift_C = _part(parts_RKC, rank, 4, rank_stride, size, row_C, inside_C) - teacher_max_C
            teacher_scale_C = tl.exp(teacher_shift_C)
            teacher_sum_C += teacher_scale_C * part_teacher_C
            # A set whose weights all underflow adds 0, even if its D is infinite.
            if LOG_RATIO_WEIGHT == _STUDENT:
                moved_C = scale_C * (part_log_ratio_C + part_sum_C * (shift_C - teacher_shift_C))
                log_ratio_C += tl.where(scale_C == 0, 0.0, moved_C)
            if LOG_RATIO_WEIGHT == _TEACHER:
                moved_C = teacher_scale_C * (part_log_ratio_C + part_teacher_C * (teacher_shift_C - shift_C))
                log_ratio_C += tl.where(teacher_scale_C == 0, 0.0, moved_C)
    joined_C = joined_KC + row_C
    tl.store(joined_C, max_C, mask=inside_C)
    tl.store(joined_C + size, sum_C, mask=inside_C)
    tl.store(joined_C + 2 * size, logit_sum_C, mask=inside_C)
    tl.store(joined_C + 3 * size, label_C, mask=inside_C)
    if HAS_TEACHER:
        tl.store(joined_C + 4 * size, teacher_max_C, mask=inside_C)
        tl.store(joined_C + 5 * size, teacher_sum_C, mask=inside_C)
        tl.store(joined_C + 6 * size, log_ratio_C, mask=inside_C)
        tl.store(joined_C + 7 * size, teacher_label_C, mask=inside_C)


@triton.jit(do_not_specialize=["size", "stride"])
def _terms(sums_NC, out_4C, size, stride, FORM: tl.constexpr, STUDENT_MIX: tl.constexpr, BLOCK: tl.constexpr):
    """Compute log p(y), H, divergence and log q(y). `FORM` is None for rows without a teacher."""
    row_C = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_C = row_C < size
    sum_C = _number(sums_NC, 1, size, row_C, inside_C)
    log_sum_C = tl.log(sum_C)
    logprob_C = _number(sums_NC, 3, size, row_C, inside_C) - _number(sums_NC, 0, size, row_C, inside_C) - log_sum_C
    value_C = tl.zeros((BLOCK,), tl.float64)
    teacher_logprob_C = value_C
    if FORM is not None:
        teacher_sum_C = _number(sums_NC, 5, size, row_C, inside_C)
        log_ratio_C = _number(sums_NC, 6, size, row_C, inside_C)
        log_teacher_sum_C = tl.log(teacher_sum_C)
        teacher_logprob_C = (
            _number(sums_NC, 7, size, row_C, inside_C) - _number(sums_NC, 4, size, row_C, inside_C) - log_teacher_sum_C
        )
        if FORM == _REVERSE_KL:
            value_C = log_ratio_C / sum_C - log_sum_C + log_teacher_sum_C
        if FORM == _FORWARD_KL:
            value_C = log_ratio_C / teacher_sum_C - log_teacher_sum_C + log_sum_C
        if FORM == _JENSEN_SHANNON:
            value_C = STUDENT_MIX * _number(sums_NC, 8, size, row_C, inside_C)
            value_C += (1 - STUDENT_MIX) * _number(sums_NC, 9, size, row_C, inside_C)
        if FORM == _SAMPLED_TOKEN:
            value_C = logprob_C - teacher_logprob_C
    out_C = out_4C + row_C
    tl.store(out_C, logprob_C, mask=inside_C)
    tl.store(out_C + stride, log_sum_C - _number(sums_NC, 2, size, row_C, inside_C) / sum_C, mask=inside_C)
    tl.store(out_C + 2 * stride, value_C, mask=inside_C)
    tl.store(out_C + 3 * stride, teacher_logprob_C, mask=inside_C)


@triton.jit(do_not_specialize=["size"])
def _coefficients(
    sums_NC,
    logprob_C,
    entropy_C,
    divergence_C,
    made_PC,
    size,
    FORM: tl.constexpr,
    STUDENT_MIX: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute `PARTS` from upstream gradients. Parts that the caller drops may be left unwritten."""
    row_C = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_C = row_C < size
    max_C = _number(sums_NC, 0, size, row_C, inside_C)
    sum_C = _number(sums_NC, 1, size, row_C, inside_C)
    constant_C = tl.zeros((BLOCK,), tl.float64)
    label_C, student_C = constant_C, constant_C
    if logprob_C is not None:
        label_C = _gradient(logprob_C, row_C, inside_C)
        constant_C = -label_C / sum_C
    if entropy_C is not None:
        student_C = -_gradient(entropy_C, row_C, inside_C) / sum_C
        constant_C -= student_C * _number(sums_NC, 2, size, row_C, inside_C) / sum_C
    made_C = made_PC + row_C
    if FORM != _NONE:
        upstream_C = _gradient(divergence_C, row_C, inside_C)
        slope_C = upstream_C / sum_C
        teacher_max_C = _number(sums_NC, 4, size, row_C, inside_C)
        teacher_sum_C = _number(sums_NC, 5, size, row_C, inside_C)
        tl.store(made_C + 4 * size, teacher_max_C, mask=inside_C)
        if FORM == _REVERSE_KL:
            constant_C -= slope_C * _number(sums_NC, 6, size, row_C, inside_C) / sum_C
            student_C += slope_C
            tl.store(made_C + 5 * size, -slope_C * INV_TEMPERATURE, mask=inside_C)
        if FORM == _FORWARD_KL:
            constant_C += slope_C
            tl.store(made_C + 6 * size, upstream_C / teacher_sum_C * INV_TEMPERATURE, mask=inside_C)
        if FORM == _JENSEN_SHANNON:
            constant_C -= STUDENT_MIX * slope_C * _number(sums_NC, 8, size, row_C, inside_C)
            tl.store(made_C + 7 * size, STUDENT_MIX * slope_C * INV_TEMPERATURE, mask=inside_C)
            tl.store(made_C + 8 * size, tl.log(sum_C), mask=inside_C)
            tl.store(made_C + 9 * size, tl.log(teacher_sum_C), mask=inside_C)
        if FORM == _SAMPLED_TOKEN:
            logprob = _number(sums_NC, 3, size, row_C, inside_C) - max_C - tl.log(sum_C)
            apart_C = logprob - (_number(sums_NC, 7, size, row_C, inside_C) - teacher_max_C - tl.log(teacher_sum_C))
            label_C += upstream_C * apart_C
            constant_C -= slope_C * apart_C
    tl.store(made_C, max_C, mask=inside_C)
    tl.store(made_C + size, constant_C * INV_TEMPERATURE, mask=inside_C)
    tl.store(made_C + 2 * size, label_C * INV_TEMPERATURE, mask=inside_C)
    tl.store(made_C + 3 * size, student_C * INV_TEMPERATURE, mask=inside_C)
