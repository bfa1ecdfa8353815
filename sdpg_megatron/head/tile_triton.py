"""`tile`'s three functions as Triton kernels: a tile of logits is read once where plain torch reads it many times.

Arguments, meanings and results are those of `tile`, with its symbols; what differs is said with each function. Triton
is optional and this module needs it: whoever calls here imports it only then.

Shapes: C rows and V columns of a tile. Inside a kernel V are the columns of one block, and a name without a suffix is a
number of the program's row.
"""
# Kernels have no types that a checker knows; all other functions here are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpg_megatron.head import tile
from sdpg_megatron.head.tile import LEAST, Gap, RowCoefficients

BLOCK = 4096
"""Columns that a program takes up at a time: a power of two."""
WARPS = 8
"""Warps of a program: 16 columns of a block for each of their threads."""

_LEAST = tl.constexpr(LEAST)
_STUDENT = tl.constexpr(Gap.STUDENT.value)
_TEACHER = tl.constexpr(Gap.TEACHER.value)


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`: on a GPU, and on anything in Triton's interpreter."""
    return device.type == "cuda" or not isinstance(_measure_row, triton.JITFunction)


def measure(
    student_CV: Tensor, teacher_CV: Tensor | None, labels_C: Tensor, gap: Gap, *, masked: bool, block: int = BLOCK
) -> Tensor:
    """`tile.measure`, reading each logit once (the label's twice).

    Args:
        masked: of no effect: -inf costs nothing here.
        block: columns a program takes up at a time, a power of two.

    Raises:
        TypeError: the logits are neither all float32 nor all float64.
    """
    _check(student_CV, teacher_CV)
    rows, columns = student_CV.shape
    if not student_CV.numel():
        return tile.measure(student_CV, teacher_CV, labels_C, gap, masked=masked)
    found_KC = student_CV.new_empty((4 if teacher_CV is None else 8, rows), dtype=torch.float64)
    with _device_of(student_CV):
        _measure_row[(rows,)](
            student_CV,
            teacher_CV,
            labels_C.contiguous(),
            found_KC,
            rows,
            columns,
            student_CV.stride(0),
            _stride(teacher_CV),
            LOWEST=torch.finfo(student_CV.dtype).min,
            GAP=gap.value,
            BLOCK=block,
            num_warps=WARPS,
        )
    return found_KC


def measure_mixture(
    student_CV: Tensor, teacher_CV: Tensor, row: RowCoefficients, *, masked: bool, block: int = BLOCK
) -> Tensor:
    """`tile.measure_mixture`, reading each logit once. `masked`, `block` and what is raised: as in `measure`."""
    _check(student_CV, teacher_CV)
    rows, columns = student_CV.shape
    if not student_CV.numel():
        return tile.measure_mixture(student_CV, teacher_CV, row, masked=masked)
    found_2C = student_CV.new_empty((2, rows), dtype=torch.float64)
    with _device_of(student_CV):
        _measure_mixture_row[(rows,)](
            student_CV,
            teacher_CV,
            found_2C,
            rows,
            columns,
            student_CV.stride(0),
            teacher_CV.stride(0),
            *_each_row(row.max, row.log_sum, row.teacher_max, row.teacher_log_sum),
            LOG_KEEP=math.log(row.keep),
            LOG_REST=math.log1p(-row.keep),
            BLOCK=block,
            num_warps=WARPS,
        )
    return found_2C


def gradient_(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    row: RowCoefficients,
    *,
    masked: bool,
    out: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """`tile.gradient_`, reading each logit once and writing each gradient once. The teacher's tile stays as it is.

    Args:
        out: bfloat16 or of the logits' type, sharing no memory with them. With it the student's tile stays as it is,
            too.

    Returns:
        `out`, or the student's tile. `masked`, `block` and what is raised: as in `measure`.
    """
    _check(student_CV, teacher_CV)
    out_CV = student_CV if out is None else out
    _check_out(student_CV, out_CV)
    if not student_CV.numel():
        return out_CV
    rows, columns = student_CV.shape
    if row.teacher is None and row.drawn is None and row.mixture is None:
        teacher_CV = None  # not read in vain
    else:
        assert teacher_CV is not None, "coefficients of the teacher come with its logits"
    with _device_of(student_CV):
        _gradient_block[(rows * triton.cdiv(columns, block),)](
            student_CV,
            teacher_CV,
            labels_C.contiguous(),
            out_CV,
            columns,
            student_CV.stride(0),
            _stride(teacher_CV),
            out_CV.stride(0),
            *_each_row(row.max, row.constant, row.label, row.student, row.teacher_max, row.teacher, row.drawn),
            *_each_row(row.mixture, row.log_sum, row.teacher_log_sum),
            LOG_KEEP=math.log(row.keep),
            LOG_REST=math.log1p(-row.keep),
            BLOCK=block,
            num_warps=WARPS,
        )
    return out_CV


def _check(student_CV: Tensor, teacher_CV: Tensor | None) -> None:
    kinds = {student_CV.dtype} if teacher_CV is None else {student_CV.dtype, teacher_CV.dtype}
    if kinds not in ({torch.float32}, {torch.float64}):
        names = " and ".join(sorted(map(str, kinds)))
        raise TypeError(f"logits: found {names}, expected all float32 or all float64. Fix: cast the tile")
    for tile_CV in (student_CV, teacher_CV):
        assert tile_CV is None or tile_CV.shape == student_CV.shape, "the tiles show the same columns of the same rows"
        assert tile_CV is None or _adjacent(tile_CV), "a row's logits lie side by side"


def _check_out(student_CV: Tensor, out_CV: Tensor) -> None:
    if out_CV.dtype not in (torch.bfloat16, student_CV.dtype):
        raise TypeError(f"out: found {out_CV.dtype}, expected torch.bfloat16 or the logits' own {student_CV.dtype}")
    assert out_CV.shape == student_CV.shape and _adjacent(out_CV), "one gradient for each logit, a row's side by side"


def _device_of(tile_CV: Tensor) -> AbstractContextManager[None]:
    """Where Triton is to launch: on the tile's GPU, be it the current one or not."""
    return torch.cuda.device_of(tile_CV)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _adjacent(tile_CV: Tensor) -> bool:
    return tile_CV.stride(1) == 1 or tile_CV.shape[1] <= 1


def _stride(tile_CV: Tensor | None) -> int:
    return 0 if tile_CV is None else tile_CV.stride(0)


def _each_row(*coefficients_C: Tensor | None) -> list[Tensor | None]:
    """Made contiguous where they are not; kernels find no strides but those of tiles."""
    return [None if given_C is None else given_C.contiguous() for given_C in coefficients_C]


# --- parts of kernels


@triton.jit
def _load_block(tile_CV, row, stride, start, columns, BLOCK: tl.constexpr):
    """Columns from `start` on, in a row's tile: -inf past its end, which weighs nothing."""
    column_V = start + tl.arange(0, BLOCK)
    return tl.load(tile_CV + row * stride + column_V, mask=column_V < columns, other=float("-inf"))


@triton.jit
def _load_row(values_C, row, kind: tl.constexpr):
    return tl.load(values_C + row).to(kind)


@triton.jit
def _product(weight, value):
    """``weight * value``; without weight 0, even where the value is infinite. NaN stays NaN."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _rise(highest, logits_V):
    """A running maximum taken over one block more.

    Returns the maximum; what to add to older log-weights (<= 0) and the exponential of that; the block's log-weights
    and their exponentials.
    """
    higher = tl.maximum(highest, tl.max(logits_V, axis=0))
    shift = highest - higher
    lower_V = logits_V - higher
    return higher, shift, tl.exp(shift), lower_V, tl.exp(lower_V)


@triton.jit
def _carry(total, mass, scale, shift):
    """A sum of ``w x``, with `mass` that of ``w``, once every w has become ``scale w`` and every x ``x + shift``."""
    return _product(scale, total + mass * shift)


@triton.jit
def _join_gap(gap, shared, lost, scale, shift, weight_V, over_V, under_V):
    """The sum of ``weight (over - under)`` taken over one block more, where both are finite.

    Weights are told apart by whether `under` is finite: the sum of those where it is, `shared`, moves with the shift;
    the sum of the others, `lost`, makes the gap infinite unless it vanishes beside weights that are yet to come.
    """
    shared_V = tl.where(under_V == float("-inf"), 0.0, weight_V)
    gap = _carry(gap, shared, scale, shift) + tl.sum(_product(shared_V, over_V - under_V), axis=0)
    shared = scale * shared + tl.sum(shared_V, axis=0)
    lost = scale * lost + tl.sum(weight_V - shared_V, axis=0)
    return gap, shared, lost


@triton.jit
def _mixture(lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_KEEP: tl.constexpr, LOG_REST: tl.constexpr):
    """log p, log q and log M, from the logits less their maximum; bounded below, or -inf would become NaN."""
    logp_V = tl.where(lower_V < _LEAST, _LEAST, lower_V) - log_sum
    logq_V = tl.where(teacher_lower_V < _LEAST, _LEAST, teacher_lower_V) - teacher_log_sum
    kept_V, rest_V = logp_V + LOG_KEEP, logq_V + LOG_REST
    logm_V = tl.maximum(kept_V, rest_V) + tl.log(1.0 + tl.exp(-tl.abs(kept_V - rest_V)))
    return logp_V, logq_V, logm_V


# --- kernels


@triton.jit(do_not_specialize=["rows"])
def _measure_row(
    student_CV,
    teacher_CV,
    labels_C,
    found_KC,
    rows,
    columns,
    student_stride,
    teacher_stride,
    LOWEST: tl.constexpr,
    GAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's statistics: a program for each, joining its blocks as shards are joined."""
    kind: tl.constexpr = student_CV.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    nothing = tl.zeros((), kind)
    highest = tl.full((), LOWEST, kind)
    teacher_highest = highest
    total, spread, teacher_total, gap, shared, lost = nothing, nothing, nothing, nothing, nothing, nothing
    for start in range(0, columns, BLOCK):
        student_V = _load_block(student_CV, row, student_stride, start, columns, BLOCK)
        if teacher_CV is not None:  # here, because a sum is a barrier that loads do not pass
            teacher_V = _load_block(teacher_CV, row, teacher_stride, start, columns, BLOCK)
        highest, shift, scale, lower_V, weight_V = _rise(highest, student_V)
        spread = _carry(spread, total, scale, shift) + tl.sum(_product(weight_V, lower_V), axis=0)
        total = scale * total + tl.sum(weight_V, axis=0)
        if teacher_CV is not None:
            teacher_highest, teacher_shift, teacher_scale, under_V, drawn_V = _rise(teacher_highest, teacher_V)
            teacher_total = teacher_scale * teacher_total + tl.sum(drawn_V, axis=0)
            apart = shift - teacher_shift
            if GAP == _STUDENT:
                gap, shared, lost = _join_gap(gap, shared, lost, scale, apart, weight_V, lower_V, under_V)
            if GAP == _TEACHER:
                gap, shared, lost = _join_gap(gap, shared, lost, teacher_scale, -apart, drawn_V, under_V, lower_V)
    label = tl.load(labels_C + row)
    owned = (label >= 0) & (label < columns)
    found_C = found_KC + row
    tl.store(found_C, highest)
    tl.store(found_C + rows, total)
    tl.store(found_C + 2 * rows, spread)
    tl.store(found_C + 3 * rows, tl.load(student_CV + row * student_stride + label, mask=owned, other=float("-inf")))
    if teacher_CV is not None:
        teacher_label = tl.load(teacher_CV + row * teacher_stride + label, mask=owned, other=float("-inf"))
        tl.store(found_C + 4 * rows, teacher_highest)
        tl.store(found_C + 5 * rows, teacher_total)
        tl.store(found_C + 6 * rows, teacher_label)
        tl.store(found_C + 7 * rows, tl.where(lost > 0, float("inf"), gap))


@triton.jit(do_not_specialize=["rows"])
def _measure_mixture_row(
    student_CV,
    teacher_CV,
    found_2C,
    rows,
    columns,
    student_stride,
    teacher_stride,
    max_C,
    log_sum_C,
    teacher_max_C,
    teacher_log_sum_C,
    LOG_KEEP: tl.constexpr,
    LOG_REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's two sums of the mixture: a program for each."""
    kind: tl.constexpr = student_CV.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    highest, log_sum = _load_row(max_C, row, kind), _load_row(log_sum_C, row, kind)
    teacher_highest, teacher_log_sum = _load_row(teacher_max_C, row, kind), _load_row(teacher_log_sum_C, row, kind)
    student_sum, teacher_sum = tl.zeros((), kind), tl.zeros((), kind)
    for start in range(0, columns, BLOCK):
        lower_V = _load_block(student_CV, row, student_stride, start, columns, BLOCK) - highest
        teacher_lower_V = _load_block(teacher_CV, row, teacher_stride, start, columns, BLOCK) - teacher_highest
        logp_V, logq_V, logm_V = _mixture(lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_KEEP, LOG_REST)
        student_sum += tl.sum(tl.exp(logp_V) * (logp_V - logm_V), axis=0)
        teacher_sum += tl.sum(tl.exp(logq_V) * (logq_V - logm_V), axis=0)
    tl.store(found_2C + row, student_sum)
    tl.store(found_2C + rows + row, teacher_sum)


@triton.jit
def _gradient_block(
    student_CV,
    teacher_CV,
    labels_C,
    out_CV,
    columns,
    student_stride,
    teacher_stride,
    out_stride,
    max_C,
    constant_C,
    label_C,
    student_C,
    teacher_max_C,
    teacher_C,
    drawn_C,
    mixture_C,
    log_sum_C,
    teacher_log_sum_C,
    LOG_KEEP: tl.constexpr,
    LOG_REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in one block of one row: a program for each. A coefficient that is None leaves no code behind."""
    kind: tl.constexpr = student_CV.dtype.element_ty
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    lower_V = _load_block(student_CV, row, student_stride, start, columns, BLOCK) - _load_row(max_C, row, kind)
    weight_V = tl.exp(lower_V)
    factor_V = tl.zeros((BLOCK,), kind) + _load_row(constant_C, row, kind)
    if student_C is not None:
        factor_V += _load_row(student_C, row, kind) * lower_V
    if teacher_CV is not None:
        teacher_V = _load_block(teacher_CV, row, teacher_stride, start, columns, BLOCK)
        teacher_lower_V = teacher_V - _load_row(teacher_max_C, row, kind)
    if teacher_C is not None:
        factor_V += _load_row(teacher_C, row, kind) * teacher_lower_V
    if mixture_C is not None:
        log_sum, teacher_log_sum = _load_row(log_sum_C, row, kind), _load_row(teacher_log_sum_C, row, kind)
        logp_V, _, logm_V = _mixture(lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_KEEP, LOG_REST)
        factor_V += _load_row(mixture_C, row, kind) * (logp_V - logm_V)
    gradient_V = _product(weight_V, factor_V)
    if drawn_C is not None:
        gradient_V -= _load_row(drawn_C, row, kind) * tl.exp(teacher_lower_V)
    column_V = start + tl.arange(0, BLOCK)
    if label_C is not None:
        gradient_V += tl.where(column_V == tl.load(labels_C + row), _load_row(label_C, row, kind), 0.0)
    tl.store(out_CV + row * out_stride + column_V, gradient_V, mask=column_V < columns)
