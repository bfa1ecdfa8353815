"""`tile`'s three functions as Triton kernels: a tile of logits is read once where plain torch reads it many times.
And `scaled`, for the weight's gradient.

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
from sdpg_megatron.head.tile import LEAST, RowCoefficients, WeightedLogRatio

BLOCK = 4096
"""Columns of a program of the gradient's kernel: a power of two, 16 for each thread."""
LOOP_BLOCK = 2048
"""Columns that the kernels with a loop take up at a time: 8 for each thread, whose sums stay in registers."""
STAGES = 3
"""Blocks in flight in those: two are loaded while one is worked on."""
WARPS = 8
"""Warps of a program."""
REGISTERS = {False: 80, True: 96}
"""Most registers of a thread of `_measure_row`, by `masked`. Three or two programs then share a multiprocessor, and
none is spilled."""

_LEAST = tl.constexpr(LEAST)
_LOG2_E = tl.constexpr(math.log2(math.e))
_STUDENT = tl.constexpr(WeightedLogRatio.STUDENT.value)
_TEACHER = tl.constexpr(WeightedLogRatio.TEACHER.value)


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`: on a GPU, and on anything in Triton's interpreter."""
    return device.type == "cuda" or not isinstance(_measure_row, triton.JITFunction)


def measure(
    student_CV: Tensor,
    teacher_CV: Tensor | None,
    labels_C: Tensor,
    weighted_log_ratio: WeightedLogRatio,
    *,
    masked: bool,
    block: int = LOOP_BLOCK,
) -> Tensor:
    """`tile.measure`, reading each logit once (the label's twice).

    Args:
        block: columns a program takes up at a time, a power of two.

    Raises:
        TypeError: the logits are neither all float32 nor all float64.
    """
    _check(student_CV, teacher_CV)
    rows, columns = student_CV.shape
    if not student_CV.numel():
        return tile.measure(student_CV, teacher_CV, labels_C, weighted_log_ratio, masked=masked)
    found_KC = student_CV.new_empty((4 if teacher_CV is None else 8, rows), dtype=torch.float64)
    with device_of(student_CV):
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
            MASKED=masked,
            GAP=weighted_log_ratio.value,
            BLOCK=block,
            STAGES=STAGES,
            num_warps=WARPS,
            maxnreg=REGISTERS[masked],
        )
    return found_KC


def measure_mixture(
    student_CV: Tensor, teacher_CV: Tensor, row: RowCoefficients, *, masked: bool, block: int = LOOP_BLOCK
) -> Tensor:
    """`tile.measure_mixture`, reading each logit once. `block` and what is raised: as in `measure`."""
    _check(student_CV, teacher_CV)
    rows, columns = student_CV.shape
    if not student_CV.numel():
        return tile.measure_mixture(student_CV, teacher_CV, row, masked=masked)
    found_2C = student_CV.new_empty((2, rows), dtype=torch.float64)
    with device_of(student_CV):
        _measure_mixture_row[(rows,)](
            student_CV,
            teacher_CV,
            found_2C,
            rows,
            columns,
            student_CV.stride(0),
            teacher_CV.stride(0),
            *_each_row(row.max, row.log_sum, row.teacher_max, row.teacher_log_sum),
            LOG_KEEP=math.log(row.student_mix),
            LOG_REST=math.log1p(-row.student_mix),
            BLOCK=block,
            STAGES=STAGES,
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
        `out`, or the student's tile. `block` and what is raised: as in `measure`.
    """
    _check(student_CV, teacher_CV)
    out_CV = student_CV if out is None else out
    _check_out(student_CV, out_CV)
    if not student_CV.numel():
        return out_CV
    rows, columns = student_CV.shape
    if row.teacher is None and row.teacher_weight is None and row.mixture is None:
        teacher_CV = None  # not read in vain
    else:
        assert teacher_CV is not None, "coefficients of the teacher come with its logits"
    with device_of(student_CV):
        _gradient_block[(rows * triton.cdiv(columns, block),)](
            student_CV,
            teacher_CV,
            labels_C.contiguous(),
            out_CV,
            columns,
            student_CV.stride(0),
            _stride(teacher_CV),
            out_CV.stride(0),
            *_each_row(row.max, row.constant, row.label, row.student, row.teacher_max, row.teacher, row.teacher_weight),
            *_each_row(row.mixture, row.log_sum, row.teacher_log_sum),
            MASKED=masked,
            LOG_KEEP=math.log(row.student_mix),
            LOG_REST=math.log1p(-row.student_mix),
            BLOCK=block,
            num_warps=WARPS,
        )
    return out_CV


def scaled(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(numbers * scale).to(dtype)``, read and written once. `numbers` is contiguous, `scale` a scalar tensor."""
    out = torch.empty_like(numbers, dtype=dtype)
    if numbers.numel():
        with device_of(numbers):
            _scale_block[(triton.cdiv(numbers.numel(), BLOCK),)](
                numbers, scale, out, numbers.numel(), BLOCK=BLOCK, num_warps=WARPS
            )
    return out


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


def device_of(tile_CV: Tensor) -> AbstractContextManager[None]:
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
def _load_block(tile_CV, row, stride, start, columns, BLOCK: tl.constexpr, past: tl.constexpr):
    """Columns from `start` on, in a row's tile; past its end a number that weighs nothing."""
    column_V = start + tl.arange(0, BLOCK)
    return tl.load(tile_CV + row * stride + column_V, mask=column_V < columns, other=past)


@triton.jit
def _load_row(values_C, row, kind: tl.constexpr):
    return tl.load(values_C + row).to(kind)


@triton.jit
def _exp(value):
    """e^x, subnormal results flushed to 0: `tl.exp` spends three more instructions on them."""
    return tl.exp2(value * _LOG2_E)


@triton.jit
def _product(weight, value):
    """``weight * value``; without weight 0, even where the value is infinite. NaN stays NaN."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _carry(sum_V, mass_V, scale, shift):
    """Sums of ``w x``, with `mass_V` those of ``w``, once every w has become ``scale w`` and every x ``x + shift``."""
    return _product(scale, sum_V + mass_V * shift)


@triton.jit
def _move(total_V, spread_V, teacher_total_V, gap_V, lost_V, shift, teacher_shift, GAP: tl.constexpr):
    """A row's sums, relative to larger maxima: these are `shift` and `teacher_shift` (<= 0) below the new ones."""
    scale, teacher_scale = _exp(shift), _exp(teacher_shift)
    spread_V = _carry(spread_V, total_V, scale, shift)
    if GAP == _STUDENT:
        gap_V, lost_V = _carry(gap_V, total_V, scale, shift - teacher_shift), lost_V * scale
    if GAP == _TEACHER:
        gap_V = _carry(gap_V, teacher_total_V, teacher_scale, teacher_shift - shift)
        lost_V = lost_V * teacher_scale
    return total_V * scale, spread_V, teacher_total_V * teacher_scale, gap_V, lost_V


@triton.jit
def _without_infinity(lower_V, MASKED: tl.constexpr):
    """Log-weights with 0 for -inf: times a weight of 0 this is no NaN. Without `MASKED`, NaN is right there."""
    return tl.where(lower_V == float("-inf"), 0.0, lower_V) if MASKED else lower_V


@triton.jit
def _add_gap(gap_V, lost_V, weight_V, over_V, under_V, MASKED: tl.constexpr):
    """D with one block more, and the weight where `under_V` is -inf.

    That weight makes D infinite unless it vanishes beside weights that are yet to come, so that it is kept apart.
    """
    gap_V += weight_V * (_without_infinity(over_V, MASKED) - _without_infinity(under_V, MASKED))
    if MASKED:
        lost_V += tl.where(under_V == float("-inf"), weight_V, 0.0)
    return gap_V, lost_V


@triton.jit
def _label_logit(tile_CV, labels_C, row, stride, columns):
    """The logit at the row's label, -inf where that is not among the columns."""
    label = tl.load(labels_C + row)
    owned = (label >= 0) & (label < columns)
    return tl.load(tile_CV + row * stride + label, mask=owned, other=float("-inf"))


@triton.jit
def _mixture(lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_KEEP: tl.constexpr, LOG_REST: tl.constexpr):
    """log p, log q and log M, from the logits less their maximum; bounded below, or -inf would become NaN."""
    logp_V = tl.where(lower_V < _LEAST, _LEAST, lower_V) - log_sum
    logq_V = tl.where(teacher_lower_V < _LEAST, _LEAST, teacher_lower_V) - teacher_log_sum
    kept_V, rest_V = logp_V + LOG_KEEP, logq_V + LOG_REST
    logm_V = tl.maximum(kept_V, rest_V) + tl.log(1.0 + _exp(-tl.abs(kept_V - rest_V)))
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
    MASKED: tl.constexpr,
    GAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row's statistics: a program for each.

    Each column of a block has sums of its own, which are added up once at the end. All of them are over weights
    relative to the largest logit so far; a block with a larger one moves them, as shards are moved when joined.
    """
    kind: tl.constexpr = student_CV.dtype.element_ty
    past: tl.constexpr = float("-inf") if MASKED else LOWEST
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), LOWEST, kind)
    teacher_highest = highest
    total_V = tl.zeros((BLOCK,), kind)
    spread_V, teacher_total_V, gap_V, lost_V = total_V, total_V, total_V, total_V
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        student_V = _load_block(student_CV, row, student_stride, start, columns, BLOCK, past)
        higher, teacher_higher = tl.maximum(highest, tl.max(student_V, axis=0)), teacher_highest
        if teacher_CV is not None:
            teacher_V = _load_block(teacher_CV, row, teacher_stride, start, columns, BLOCK, past)
            teacher_higher = tl.maximum(teacher_highest, tl.max(teacher_V, axis=0))
        if (higher > highest) | (teacher_higher > teacher_highest):
            shift, teacher_shift = highest - higher, teacher_highest - teacher_higher
            total_V, spread_V, teacher_total_V, gap_V, lost_V = _move(
                total_V, spread_V, teacher_total_V, gap_V, lost_V, shift, teacher_shift, GAP
            )
            highest, teacher_highest = higher, teacher_higher
        lower_V = student_V - highest
        weight_V = _exp(lower_V)
        total_V += weight_V
        spread_V += weight_V * _without_infinity(lower_V, MASKED)
        if teacher_CV is not None:
            under_V = teacher_V - teacher_highest
            drawn_V = _exp(under_V)
            teacher_total_V += drawn_V
            if GAP == _STUDENT:
                gap_V, lost_V = _add_gap(gap_V, lost_V, weight_V, lower_V, under_V, MASKED)
            if GAP == _TEACHER:
                gap_V, lost_V = _add_gap(gap_V, lost_V, drawn_V, under_V, lower_V, MASKED)
    found_C = found_KC + row
    tl.store(found_C, highest)
    tl.store(found_C + rows, tl.sum(total_V, axis=0))
    tl.store(found_C + 2 * rows, tl.sum(spread_V, axis=0))
    tl.store(found_C + 3 * rows, _label_logit(student_CV, labels_C, row, student_stride, columns))
    if teacher_CV is not None:
        lost = tl.sum(lost_V, axis=0)
        tl.store(found_C + 4 * rows, teacher_highest)
        tl.store(found_C + 5 * rows, tl.sum(teacher_total_V, axis=0))
        tl.store(found_C + 6 * rows, tl.where(lost > 0, float("inf"), tl.sum(gap_V, axis=0)))
        tl.store(found_C + 7 * rows, _label_logit(teacher_CV, labels_C, row, teacher_stride, columns))


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
    STAGES: tl.constexpr,
):
    """One row's two sums of the mixture: a program for each."""
    kind: tl.constexpr = student_CV.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    highest, log_sum = _load_row(max_C, row, kind), _load_row(log_sum_C, row, kind)
    teacher_highest, teacher_log_sum = _load_row(teacher_max_C, row, kind), _load_row(teacher_log_sum_C, row, kind)
    student_sum_V = tl.zeros((BLOCK,), kind)
    teacher_sum_V = student_sum_V
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        student_V = _load_block(student_CV, row, student_stride, start, columns, BLOCK, float("-inf"))
        teacher_V = _load_block(teacher_CV, row, teacher_stride, start, columns, BLOCK, float("-inf"))
        lower_V, teacher_lower_V = student_V - highest, teacher_V - teacher_highest
        logp_V, logq_V, logm_V = _mixture(lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_KEEP, LOG_REST)
        student_sum_V += _exp(logp_V) * (logp_V - logm_V)
        teacher_sum_V += _exp(logq_V) * (logq_V - logm_V)
    tl.store(found_2C + row, tl.sum(student_sum_V, axis=0))
    tl.store(found_2C + rows + row, tl.sum(teacher_sum_V, axis=0))


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
    MASKED: tl.constexpr,
    LOG_KEEP: tl.constexpr,
    LOG_REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in one block of one row: a program for each. A coefficient that is None leaves no code behind."""
    kind: tl.constexpr = student_CV.dtype.element_ty
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    student_V = _load_block(student_CV, row, student_stride, start, columns, BLOCK, float("-inf"))
    lower_V = student_V - _load_row(max_C, row, kind)
    weight_V = _exp(lower_V)
    factor_V = tl.zeros((BLOCK,), kind) + _load_row(constant_C, row, kind)
    if student_C is not None:
        factor_V += _load_row(student_C, row, kind) * lower_V
    if teacher_CV is not None:
        teacher_V = _load_block(teacher_CV, row, teacher_stride, start, columns, BLOCK, float("-inf"))
        teacher_lower_V = teacher_V - _load_row(teacher_max_C, row, kind)
    if teacher_C is not None:
        factor_V += _load_row(teacher_C, row, kind) * teacher_lower_V
    if mixture_C is not None:
        log_sum, teacher_log_sum = _load_row(log_sum_C, row, kind), _load_row(teacher_log_sum_C, row, kind)
        logp_V, _, logm_V = _mixture(lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_KEEP, LOG_REST)
        factor_V += _load_row(mixture_C, row, kind) * (logp_V - logm_V)
    gradient_V = _product(weight_V, factor_V) if MASKED else weight_V * factor_V
    if drawn_C is not None:
        gradient_V -= _load_row(drawn_C, row, kind) * _exp(teacher_lower_V)
    column_V = start + tl.arange(0, BLOCK)
    if label_C is not None:
        gradient_V += tl.where(column_V == tl.load(labels_C + row), _load_row(label_C, row, kind), 0.0)
    tl.store(out_CV + row * out_stride + column_V, gradient_V, mask=column_V < columns)


@triton.jit
def _scale_block(numbers_V, scale, out_V, size, BLOCK: tl.constexpr):
    at_V = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_V = at_V < size
    tl.store(out_V + at_V, tl.load(numbers_V + at_V, mask=inside_V) * tl.load(scale), mask=inside_V)
