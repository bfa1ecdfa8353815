"""Tiles of logits, and how far from float64 `tile_triton` may be on them.

A kernel's result is compared with what `tile` makes in float64 of the same numbers. How far they may be apart follows
from the formulas: a log-weight x = z - m is off by eps |x|, its exponential by as much in proportion, and a sum in
proportion to the absolute values of its terms. The bounds here are `ROUNDINGS` times that.

Shapes: C rows, V columns of a tile, W columns of the tensor that the tile is cut from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from sdpg_megatron.head import tile
from sdpg_megatron.head.tile import RowCoefficients, WeightedLogRatio

ROUNDINGS = 4
VANISHING = 1e-30
"""Below this float32 may have lost a number altogether."""
MARGIN = 16
"""Columns on either side of a tile. The first one after it stands for the rest of the vocabulary."""

PARTS = {
    "log-prob": ("label",),
    "entropy": ("label", "student"),
    "reverse KL": ("label", "student", "teacher"),
    "reverse KL alone": ("student", "teacher"),
    "forward KL": ("label", "student", "teacher_weight"),
    "forward KL alone": ("teacher_weight",),
    "mixture": ("label", "student", "mixture"),
    "mixture alone": ("mixture",),
    "constant alone": (),
}
"""Optional parts of `RowCoefficients` that occur together."""
TAUGHT = {"teacher", "teacher_weight", "mixture"}
"""Those that need a teacher."""


@dataclass(frozen=True)
class Tiles:
    """Logits of some columns, cut from wider tensors, and coefficients of their rows with all parts given."""

    student_CW: Tensor
    teacher_CW: Tensor
    labels_C: Tensor
    """Columns of the tile, or anything else."""
    row: RowCoefficients

    @property
    def student_CV(self) -> Tensor:
        return self.student_CW[:, MARGIN:-MARGIN]

    @property
    def teacher_CV(self) -> Tensor:
        return self.teacher_CW[:, MARGIN:-MARGIN]

    @property
    def columns(self) -> int:
        return self.student_CV.shape[1]

    @property
    def masked(self) -> bool:
        return bool(torch.isneginf(self.student_CV).any() or torch.isneginf(self.teacher_CV).any())

    def double(self) -> Tiles:
        """A copy, whatever the type."""
        student_CW, teacher_CW = (
            logits_CW.to(torch.float64, copy=True) for logits_CW in (self.student_CW, self.teacher_CW)
        )
        return replace(self, student_CW=student_CW, teacher_CW=teacher_CW)

    def clone(self) -> Tiles:
        return replace(self, student_CW=self.student_CW.clone(), teacher_CW=self.teacher_CW.clone())


def make_tiles(
    student_CW: Tensor, teacher_CW: Tensor, labels_C: Tensor, *, seed: int = 0, student_mix: float = 0.5
) -> Tiles:
    """The vocabulary is the tile and one column more, so that rows of the tile alone may be all -inf."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        tile.measure(logits_CW[:, MARGIN : 1 - MARGIN].double(), None, labels_C, WeightedLogRatio.NONE, masked=True)
        for logits_CW in (student_CW, teacher_CW)
    )
    names = ("constant", "label", "student", "teacher", "teacher_weight", "mixture")
    # A row's numbers lie side by side, so that no coefficient is contiguous.
    drawn = torch.randn(labels_C.numel(), len(names), generator=generator, dtype=torch.float64).to(labels_C.device)
    row = RowCoefficients(
        max=student[0],
        log_sum=student[1].log(),
        teacher_max=teacher[0],
        teacher_log_sum=teacher[1].log(),
        student_mix=student_mix,
        **dict(zip(names, drawn.unbind(1), strict=True)),
    )
    return Tiles(student_CW, teacher_CW, labels_C, row)


# --- checks: each runs a kernel and asserts


def check_measure(
    kernels: ModuleType, tiles: Tiles, weighted_log_ratio: WeightedLogRatio | None, **options: int
) -> None:
    """`weighted_log_ratio` None: no teacher."""
    exact = tiles.double()
    how = weighted_log_ratio or WeightedLogRatio.NONE
    expected_KC = tile.measure(
        exact.student_CV, exact.teacher_CV if weighted_log_ratio else None, tiles.labels_C, how, masked=True
    )
    expected_KC[::4].clamp_(min=torch.finfo(tiles.student_CW.dtype).min)  # the maxima of nothing
    bound_KC = _roundings(tiles) * _measure_bound(exact, how)[: len(expected_KC)]
    for masked in {True, tiles.masked}:
        given = tiles.clone()
        found_KC = kernels.measure(
            given.student_CV,
            given.teacher_CV if weighted_log_ratio else None,
            tiles.labels_C,
            how,
            masked=masked,
            **options,
        )
        assert found_KC.dtype == torch.float64
        assert_within(found_KC, expected_KC, bound_KC)
        assert_same(given, tiles)


def check_mixture(kernels: ModuleType, tiles: Tiles, **options: int) -> None:
    given, exact = tiles.clone(), tiles.double()
    found_2C = kernels.measure_mixture(given.student_CV, given.teacher_CV, tiles.row, masked=True, **options)
    expected_2C = tile.measure_mixture(exact.student_CV, exact.teacher_CV, tiles.row, masked=True)
    assert found_2C.dtype == torch.float64
    assert_within(found_2C, expected_2C, _roundings(tiles) * _mixture_bound(exact))
    assert_same(given, tiles)


def check_gradient(
    kernels: ModuleType,
    tiles: Tiles,
    parts: Iterable[str],
    out_dtype: torch.dtype | None = None,
    *,
    ulp: float = 0.5,
    **options: int,
) -> None:
    """In place, or with `out_dtype` into a view of a larger tensor of this type, which may round by `ulp`."""
    given, exact = tiles.clone(), tiles.double()
    dropped = {"label", "student", *TAUGHT} - set(parts)
    row = replace(tiles.row, **dict.fromkeys(dropped))
    has_teacher = bool(TAUGHT & set(parts))
    bound_CV = _roundings(tiles) * _gradient_bound(exact, row)
    out_CW = None if out_dtype is None else _sevens(tiles.student_CW, out_dtype)
    out_CV = given.student_CV if out_CW is None else out_CW[:, MARGIN : MARGIN + tiles.columns]
    found_CV = kernels.gradient_(
        given.student_CV if out_CW is not None else out_CV,
        given.teacher_CV if has_teacher else None,
        tiles.labels_C,
        row,
        masked=tiles.masked,
        **({} if out_CW is None else {"out": out_CV}),
        **options,
    )
    expected_CV = tile.gradient_(
        exact.student_CV, exact.teacher_CV if has_teacher else None, tiles.labels_C, row, masked=tiles.masked
    )
    assert found_CV is out_CV
    bound_CV += ulp * torch.finfo(found_CV.dtype).eps * expected_CV.abs()
    assert_within(found_CV.double(), expected_CV, bound_CV)
    if out_CW is None:
        out_CV.copy_(tiles.student_CV)  # what can differ now are the neighbours
    else:
        out_CV.fill_(7.0)
        assert bool((out_CW == 7.0).all()), "a neighbour of `out` was overwritten"
    assert_same(given, tiles)


def _sevens(like_CW: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of another length, to be told from those of the logits."""
    rows, wide = like_CW.shape
    return torch.full((rows, wide + MARGIN), 7.0, dtype=dtype, device=like_CW.device)


def assert_same(given: Tiles, tiles: Tiles) -> None:
    """Nothing was overwritten, neighbours included."""
    assert torch.equal(given.student_CW, tiles.student_CW), "the student's tensor was overwritten"
    assert torch.equal(given.teacher_CW, tiles.teacher_CW), "the teacher's tensor was overwritten"


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Within `bound` of each finite number; infinities are met exactly, and NaN never passes."""
    assert found.shape == expected.shape
    apart = torch.where(found == expected, 0.0, (found - expected).abs())
    wrong = ~(apart <= bound + VANISHING)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        at = tuple(where)
        raise AssertionError(
            f"at {where}: found {found[at]}, expected {expected[at]}, {apart[at]:.3g} apart, {bound[at]:.3g} allowed; "
            f"{int(wrong.sum())} of {wrong.numel()} are wrong"
        )


# --- bounds, before `ROUNDINGS` and eps


def _roundings(tiles: Tiles) -> float:
    return ROUNDINGS * torch.finfo(tiles.student_CW.dtype).eps


def _lower(logits_CV: Tensor, max_C: Tensor) -> tuple[Tensor, Tensor]:
    """|x|, 0 for an infinite x, and e^x (1 + |x|), by which e^x may be off."""
    lower_CV = logits_CV - max_C[:, None]
    size_CV = torch.where(torch.isinf(lower_CV), 0.0, lower_CV.abs())
    return size_CV, lower_CV.exp() * (1 + size_CV)


def _own_lower(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """With the maximum of the tile itself."""
    nowhere_C = torch.full_like(logits_CV[:, :1].sum(1), -1).long()
    return _lower(logits_CV, tile.measure(logits_CV, None, nowhere_C, WeightedLogRatio.NONE, masked=True)[0])


def _measure_bound(exact: Tiles, weighted_log_ratio: WeightedLogRatio) -> Tensor:
    size_CV, weight_CV = _own_lower(exact.student_CV)
    teacher_size_CV, teacher_weight_CV = _own_lower(exact.teacher_CV)
    over_CV = {
        WeightedLogRatio.STUDENT: weight_CV,
        WeightedLogRatio.TEACHER: teacher_weight_CV,
        WeightedLogRatio.NONE: torch.zeros_like(teacher_weight_CV),
    }[weighted_log_ratio]
    log_ratio_C = (over_CV * (1 + size_CV + teacher_size_CV)).sum(1)
    none_C = torch.zeros_like(log_ratio_C)
    logit_sum_C = (weight_CV * size_CV).sum(1)
    return torch.stack(
        (none_C, weight_CV.sum(1), logit_sum_C, none_C, none_C, teacher_weight_CV.sum(1), log_ratio_C, none_C)
    )


def _mixture_bound(exact: Tiles) -> Tensor:
    return torch.stack(
        [
            (share_CV * (1 + size_CV)).sum(1)
            for size_CV, share_CV in (
                _lower(exact.student_CV, exact.row.max + exact.row.log_sum),
                _lower(exact.teacher_CV, exact.row.teacher_max + exact.row.teacher_log_sum),
            )
        ]
    )


def _gradient_bound(exact: Tiles, row: RowCoefficients) -> Tensor:
    def size(coefficient_C: Tensor | None) -> Tensor:
        return torch.zeros_like(row.max)[:, None] if coefficient_C is None else coefficient_C.abs()[:, None]

    size_CV, weight_CV = _lower(exact.student_CV, row.max)
    teacher_size_CV, teacher_weight_CV = _lower(exact.teacher_CV, row.teacher_max)
    share_CV = 1 + size_CV + row.log_sum[:, None].abs()
    slope_CV = size(row.student) * size_CV + size(row.teacher) * teacher_size_CV + size(row.mixture) * share_CV
    bound_CV = weight_CV * (size(row.constant) + slope_CV) + size(row.teacher_weight) * teacher_weight_CV
    # The label's coefficient stands in one column, but is added to what it may cancel.
    column_V = torch.arange(bound_CV.shape[1], device=bound_CV.device)
    return bound_CV + size(row.label) * (column_V == exact.labels_C[:, None])
