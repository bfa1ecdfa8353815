"""The functions of `tile` as Triton kernels that read each logit once, and `scaled` for the weight gradient.

Arguments, results and symbols: see `tile`; the functions here state the differences. Triton is an optional dependency:
import this module only if it is installed.

Shapes: C rows, V columns of a tile. Inside a kernel, V is the columns of one block, and a name without a suffix is a
scalar of the program's row.
"""
# Type checkers do not understand Triton kernels; all other functions here are annotated.
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
"""Columns per program of the gradient kernel: a power of two, 16 per thread."""
LOOP_BLOCK = 2048
"""Columns per iteration of the kernels with a loop: 8 per thread, so that its sums stay in registers."""
STAGES = 3
"""Pipeline stages of these loops: two blocks are loaded while one is processed."""
WARPS = 8
"""Warps per program."""
REGISTERS = {False: 80, True: 96}
"""Maximum registers per thread of `_measure_row`, by `masked`. Three or two programs then fit a multiprocessor, without
spills."""

_LEAST = tl.constexpr(LEAST)
_LOG2_E = tl.constexpr(math.log2(math.e))
_STUDENT = tl.constexpr(WeightedLogRatio.STUDENT.value)
_TEACHER = tl.constexpr(WeightedLogRatio.TEACHER.value)


def available(device: torch.device) -> bool:
    """True if the kernels run on tensors of `device`: a GPU, or any device with Triton's interpreter."""
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
    """`tile.measure`, reading each logit once and the label's twice.

    Args:
        block: columns per iteration, a power of two.

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
            LOG_RATIO_WEIGHT=weighted_log_ratio.value,
            BLOCK=block,
            STAGES=STAGES,
            num_warps=WARPS,
            maxnreg=REGISTERS[masked],
        )
    return found_KC


def measure_mixture(
    student_CV: Tensor, teacher_CV: Tensor, row: RowCoefficients, *, masked: bool, block: int = LOOP_BLOCK
) -> Tensor:
    """`tile.measure_mixture`, reading each logit once. `block` and errors: see `measure`."""
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
            LOG_STUDENT_MIX=math.log(row.student_mix),
            LOG_TEACHER_MIX=math.log1p(-row.student_mix),
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
    """`tile.gradient_`, reading each logit once and writing each gradient once. The teacher's tile is not changed.

    Args:
        out: bfloat16 or the logits' type, not overlapping the logits. If given, the student's tile is not changed.
        block: columns per program, a power of two.

    Returns:
        `out`, or the student's tile.

    Raises:
        TypeError: see `measure`; or `out` has another type.
    """
    _check(student_CV, teacher_CV)
    out_CV = student_CV if out is None else out
    _check_out(student_CV, out_CV)
    if not student_CV.numel():
        return out_CV
    rows, columns = student_CV.shape
    if row.teacher is None and row.teacher_weight is None and row.mixture is None:
        teacher_CV = None  # avoid an unused read
    else:
        assert teacher_CV is not None, "teacher coefficients need the teacher's logits"
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
            LOG_STUDENT_MIX=math.log(row.student_mix),
            LOG_TEACHER_MIX=math.log1p(-row.student_mix),
            BLOCK=block,
            num_warps=WARPS,
        )
    return out_CV


def scaled(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(numbers * scale).to(dtype)`` in one pass. `numbers` must be contiguous, `scale` a scalar tensor."""
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
        assert tile_CV is None or tile_CV.shape == student_CV.shape, "both tiles have the same shape"
        assert tile_CV is None or _contiguous_rows(tile_CV), "each row of logits is contiguous"


def _check_out(student_CV: Tensor, out_CV: Tensor) -> None:
    if out_CV.dtype not in (torch.bfloat16, student_CV.dtype):
        raise TypeError(f"out: found {out_CV.dtype}, expected torch.bfloat16 or the logits' {student_CV.dtype}")
    assert out_CV.shape == student_CV.shape and _contiguous_rows(out_CV), "out has the logits' shape, contiguous rows"


def device_of(tile_CV: Tensor) -> AbstractContextManager[None]:
    """Make the tile's GPU the current device, on which Triton launches."""
    return torch.cuda.device_of(tile_CV)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _contiguous_rows(tile_CV: Tensor) -> bool:
    return tile_CV.stride(1) == 1 or tile_CV.shape[1] <= 1


def _stride(tile_CV: Tensor | None) -> int:
    return 0 if tile_CV is None else tile_CV.stride(0)


def _each_row(*coefficients_C: Tensor | None) -> list[Tensor | None]:
    """Make each contiguous: kernels get strides only for tiles."""
    return [None if given_C is None else given_C.contiguous() for given_C in coefficients_C]


# --- device functions


@triton.jit
def _load_block(tile_CV, row, stride, start, columns, BLOCK: tl.constexpr, past: tl.constexpr):
    """Load a block of a row from column `start`; `past`, which has weight 0, beyond the row's end."""
    column_V = start + tl.arange(0, BLOCK)
    return tl.load(tile_CV + row * stride + column_V, mask=column_V < columns, other=past)


@triton.jit
def _load_row(values_C, row, kind: tl.constexpr):
    return tl.load(values_C + row).to(kind)


@triton.jit
def _exp(value):
    """e^x with subnormal results flushed to 0, which saves three instructions of `tl.exp`."""
    return tl.exp2(value * _LOG2_E)


@triton.jit
def _product(weight, value):
    """``weight * value``, and 0 for weight 0 even if the value is infinite. A NaN weight gives NaN."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _carry(sum_V, mass_V, scale, shift):
    """Rescale `sum_V`, sums of ``w x``, for weights ``scale w`` and values ``x + shift``. `mass_V`: sums of ``w``."""
    return _product(scale, sum_V + mass_V * shift)


@triton.jit
def _move(
    total_V, logit_sum_V, teacher_total_V, log_ratio_V, lost_V, shift, teacher_shift, LOG_RATIO_WEIGHT: tl.constexpr
):
    """Rescale a row's sums to larger maxima. `shift`, `teacher_shift`: old less new maximum (<= 0)."""
    scale, teacher_scale = _exp(shift), _exp(teacher_shift)
    logit_sum_V = _carry(logit_sum_V, total_V, scale, shift)
    if LOG_RATIO_WEIGHT == _STUDENT:
        log_ratio_V, lost_V = _carry(log_ratio_V, total_V, scale, shift - teacher_shift), lost_V * scale
    if LOG_RATIO_WEIGHT == _TEACHER:
        log_ratio_V = _carry(log_ratio_V, teacher_total_V, teacher_scale, teacher_shift - shift)
        lost_V = lost_V * teacher_scale
    return total_V * scale, logit_sum_V, teacher_total_V * teacher_scale, log_ratio_V, lost_V


@triton.jit
def _without_infinity(lower_V, MASKED: tl.constexpr):
    """Log-weights with -inf replaced by 0, so that weight 0 times it is not NaN. Without `MASKED`, NaN is correct."""
    return tl.where(lower_V == float("-inf"), 0.0, lower_V) if MASKED else lower_V


@triton.jit
def _add_log_ratio(log_ratio_V, lost_V, weight_V, over_V, under_V, MASKED: tl.constexpr):
    """Add a block to D, and to `lost_V` its weight where `under_V` is -inf.

    The lost weight makes D infinite, unless a larger maximum in a later block makes it underflow to 0. It is therefore
    summed separately.
    """
    log_ratio_V += weight_V * (_without_infinity(over_V, MASKED) - _without_infinity(under_V, MASKED))
    if MASKED:
        lost_V += tl.where(under_V == float("-inf"), weight_V, 0.0)
    return log_ratio_V, lost_V


@triton.jit
def _label_logit(tile_CV, labels_C, row, stride, columns):
    """Logit of the row's label; -inf if the label is not among the columns."""
    label = tl.load(labels_C + row)
    owned = (label >= 0) & (label < columns)
    return tl.load(tile_CV + row * stride + label, mask=owned, other=float("-inf"))


@triton.jit
def _mixture(
    lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_STUDENT_MIX: tl.constexpr, LOG_TEACHER_MIX: tl.constexpr
):
    """log p, log q and log M from the logits less their maxima, clamped to `LEAST` so that -inf does not give NaN."""
    logp_V = tl.where(lower_V < _LEAST, _LEAST, lower_V) - log_sum
    logq_V = tl.where(teacher_lower_V < _LEAST, _LEAST, teacher_lower_V) - teacher_log_sum
    kept_V, rest_V = logp_V + LOG_STUDENT_MIX, logq_V + LOG_TEACHER_MIX
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
    LOG_RATIO_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Statistics of one row per program.

    Each column position of a block has its own sums, reduced once at the end. Weights are relative to the largest logit
    so far. A block with a larger logit rescales all sums, as `statistics.join` does.
    """
    kind: tl.constexpr = student_CV.dtype.element_ty
    past: tl.constexpr = float("-inf") if MASKED else LOWEST
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), LOWEST, kind)
    teacher_highest = highest
    total_V = tl.zeros((BLOCK,), kind)
    logit_sum_V, teacher_total_V, log_ratio_V, lost_V = total_V, total_V, total_V, total_V
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        student_V = _load_block(student_CV, row, student_stride, start, columns, BLOCK, past)
        higher, teacher_higher = tl.maximum(highest, tl.max(student_V, axis=0)), teacher_highest
        if teacher_CV is not None:
            teacher_V = _load_block(teacher_CV, row, teacher_stride, start, columns, BLOCK, past)
            teacher_higher = tl.maximum(teacher_highest, tl.max(teacher_V, axis=0))
        if (higher > highest) | (teacher_higher > teacher_highest):
            shift, teacher_shift = highest - higher, teacher_highest - teacher_higher
            total_V, logit_sum_V, teacher_total_V, log_ratio_V, lost_V = _move(
                total_V, logit_sum_V, teacher_total_V, log_ratio_V, lost_V, shift, teacher_shift, LOG_RATIO_WEIGHT
            )
            highest, teacher_highest = higher, teacher_higher
        lower_V = student_V - highest
        weight_V = _exp(lower_V)
        total_V += weight_V
        logit_sum_V += weight_V * _without_infinity(lower_V, MASKED)
        if teacher_CV is not None:
            under_V = teacher_V - teacher_highest
            teacher_weight_V = _exp(under_V)
            teacher_total_V += teacher_weight_V
            if LOG_RATIO_WEIGHT == _STUDENT:
                log_ratio_V, lost_V = _add_log_ratio(log_ratio_V, lost_V, weight_V, lower_V, under_V, MASKED)
            if LOG_RATIO_WEIGHT == _TEACHER:
                log_ratio_V, lost_V = _add_log_ratio(log_ratio_V, lost_V, teacher_weight_V, under_V, lower_V, MASKED)
    found_C = found_KC + row
    tl.store(found_C, highest)
    tl.store(found_C + rows, tl.sum(total_V, axis=0))
    tl.store(found_C + 2 * rows, tl.sum(logit_sum_V, axis=0))
    tl.store(found_C + 3 * rows, _label_logit(student_CV, labels_C, row, student_stride, columns))
    if teacher_CV is not None:
        lost = tl.sum(lost_V, axis=0)
        tl.store(found_C + 4 * rows, teacher_highest)
        tl.store(found_C + 5 * rows, tl.sum(teacher_total_V, axis=0))
        tl.store(found_C + 6 * rows, tl.where(lost > 0, float("inf"), tl.sum(log_ratio_V, axis=0)))
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
    LOG_STUDENT_MIX: tl.constexpr,
    LOG_TEACHER_MIX: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The two mixture sums of one row per program."""
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
        logp_V, logq_V, logm_V = _mixture(
            lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_STUDENT_MIX, LOG_TEACHER_MIX
        )
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
    teacher_weight_C,
    mixture_C,
    log_sum_C,
    teacher_log_sum_C,
    MASKED: tl.constexpr,
    LOG_STUDENT_MIX: tl.constexpr,
    LOG_TEACHER_MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of one block of one row per program. A coefficient that is None compiles to no code."""
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
        logp_V, _, logm_V = _mixture(
            lower_V, log_sum, teacher_lower_V, teacher_log_sum, LOG_STUDENT_MIX, LOG_TEACHER_MIX
        )
        factor_V += _load_row(mixture_C, row, kind) * (logp_V - logm_V)
    gradient_V = _product(weight_V, factor_V) if MASKED else weight_V * factor_V
    if teacher_weight_C is not None:
        gradient_V -= _load_row(teacher_weight_C, row, kind) * _exp(teacher_lower_V)
    column_V = start + tl.arange(0, BLOCK)
    if label_C is not None:
        gradient_V += tl.where(column_V == tl.load(labels_C + row), _load_row(label_C, row, kind), 0.0)
    tl.store(out_CV + row * out_stride + column_V, gradient_V, mask=column_V < columns)


@triton.jit
def _scale_block(numbers_V, scale, out_V, size, BLOCK: tl.constexpr):
    at_V = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_V = at_V < size
    tl.store(out_V + at_V, tl.load(numbers_V + at_V, mask=inside_V) * tl.load(scale), mask=inside_V)
