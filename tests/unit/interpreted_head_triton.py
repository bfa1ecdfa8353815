"""`tile_triton` against `tile`, in Triton's interpreter. `test_head_triton` runs this in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpg_megatron.head import tile, tile_triton
from sdpg_megatron.head.tile import Gap
from tests.head_tiles import MARGIN, PARTS, Tiles, check_gradient, check_measure, check_mixture, make_tiles

settings.register_profile("interpreter", deadline=None, derandomize=True)
settings.load_profile("interpreter")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 * -inf, not taken up

BLOCK = 16
CUT_OFF = 1.0
"""The interpreter cuts float32 off to bfloat16. A GPU rounds it: `test_head_triton` looks for that instruction."""
GAPS = [None, *Gap]

CENTRES = {
    "around zero": (0.0, 0.0),
    "below -100": (-150.0, -150.0),
    "around 1000": (1e3, 1e3),
    "far apart": (1e4, -1e4),
}
"""Every logit lies near one of two numbers, chosen column by column."""


@dataclass(frozen=True)
class Case:
    """What random tiles are like."""

    rows: int
    columns: int
    seed: int
    student: str = "around zero"
    teacher: str = "around zero"
    student_barred: float = 0.0
    """Share of the columns at -inf."""
    teacher_barred: float = 0.0
    together: bool = False
    """Bar the same columns, as far as the shares allow."""
    keep: float = 0.5

    def tiles(self, *, same_support: bool = False) -> Tiles:
        """float32. With `same_support` the teacher has a weight wherever the student has."""
        generator = torch.Generator().manual_seed(self.seed)
        student_CW, teacher_CW = self.logits(self.student, generator), self.logits(self.teacher, generator)
        chance_2CV = torch.rand(2, self.rows, self.columns, generator=generator)
        bars_CV = chance_2CV[0] < self.student_barred
        teacher_bars_CV = chance_2CV[0 if self.together else 1] < self.teacher_barred
        bars_CV = bars_CV | teacher_bars_CV if same_support else bars_CV
        student_CW[:, MARGIN:-MARGIN].masked_fill_(bars_CV, -torch.inf)
        teacher_CW[:, MARGIN:-MARGIN].masked_fill_(teacher_bars_CV, -torch.inf)
        labels_C2 = torch.randint(-3, self.columns + BLOCK, (self.rows, 2), generator=generator)
        return make_tiles(student_CW, teacher_CW, labels_C2[:, 0], seed=self.seed, keep=self.keep)

    def logits(self, centre: str, generator: torch.Generator) -> Tensor:
        """Log-weights are above -40 or below -10000, hence 0 in float32 only where they are in float64."""
        wide = self.columns + 2 * MARGIN
        first_CW = torch.rand(self.rows, wide, generator=generator) < 0.5
        noise_CW = 3 * torch.randn(self.rows, wide, generator=generator)
        return torch.where(first_CW, *CENTRES[centre]) + noise_CW.clamp(-15, 15)


SHARES = st.sampled_from([0.0, 0.1, 0.9, 1.0])
CASES = st.builds(
    Case,
    rows=st.integers(0, 9),
    columns=st.integers(0, 70),
    seed=st.integers(0, 2**20),
    student=st.sampled_from(sorted(CENTRES)),
    teacher=st.sampled_from(sorted(CENTRES)),
    student_barred=SHARES,
    teacher_barred=SHARES,
    together=st.booleans(),
    keep=st.sampled_from([0.5, 0.9]),
)


def fixed(rows: int = 3, columns: int = 37, dtype: torch.dtype = torch.float32) -> Tiles:
    tiles = Case(rows, columns, seed=0).tiles()
    return make_tiles(tiles.student_CW.to(dtype), tiles.teacher_CW.to(dtype), torch.arange(rows) * 18 % max(columns, 1))


@pytest.mark.parametrize("gap", GAPS)
@settings(max_examples=30)
@given(case=CASES)
def test_measure(gap: Gap | None, case: Case) -> None:
    check_measure(tile_triton, case.tiles(), gap, block=BLOCK)


@settings(max_examples=30)
@given(CASES)
def test_mixture(case: Case) -> None:
    check_mixture(tile_triton, case.tiles(), block=BLOCK)


@pytest.mark.parametrize("name", PARTS)
@settings(max_examples=12)
@given(case=CASES, out=st.sampled_from([None, torch.bfloat16, torch.float32]))
def test_gradient(name: str, case: Case, out: torch.dtype | None) -> None:
    through_teacher = "teacher" in PARTS[name]
    # `tile` bounds the teacher's finite log-weights, too, where -inf may occur: none below that bound, then.
    assume(not (through_teacher and case.teacher == "far apart" and case.student_barred + case.teacher_barred))
    check_gradient(tile_triton, case.tiles(same_support=through_teacher), PARTS[name], out, ulp=CUT_OFF, block=BLOCK)


@pytest.mark.parametrize(("rows", "columns"), [(0, 37), (3, 0), (0, 0), (1, 1), (2, BLOCK), (1, BLOCK + 1)])
def test_sizes_at_the_edge(rows: int, columns: int) -> None:
    tiles = fixed(rows, columns)
    for gap in GAPS:
        check_measure(tile_triton, tiles, gap, block=BLOCK)
    check_mixture(tile_triton, tiles, block=BLOCK)
    check_gradient(tile_triton, tiles, PARTS["reverse KL"], block=BLOCK)
    check_gradient(tile_triton, tiles, PARTS["forward KL"], torch.bfloat16, ulp=CUT_OFF, block=BLOCK)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0)])
def test_nothing_is_launched_for_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """A grid of no programs is an error on a GPU."""
    for kernel in ("_measure_row", "_measure_mixture_row", "_gradient_block"):
        monkeypatch.setattr(tile_triton, kernel, None)
    tiles = fixed(rows, columns)
    check_measure(tile_triton, tiles, Gap.STUDENT)
    check_mixture(tile_triton, tiles)
    check_gradient(tile_triton, tiles, PARTS["mixture"])


def test_float64() -> None:
    tiles = fixed(dtype=torch.float64)
    for gap in GAPS:
        check_measure(tile_triton, tiles, gap, block=BLOCK)
    check_mixture(tile_triton, tiles, block=BLOCK)
    for parts in PARTS.values():
        check_gradient(tile_triton, tiles, parts, block=BLOCK)


def measure_one(student_V: Tensor, teacher_V: Tensor, gap: Gap) -> Tensor:
    """Statistics [8] of one row, the same by `tile` in float32 and by kernels with one block and with several."""
    label = torch.zeros(1, dtype=torch.int64)
    expected_8C = tile.measure(student_V[None].clone(), teacher_V[None].clone(), label, gap, masked=True)
    for block in (BLOCK, 64):
        found_8C = tile_triton.measure(student_V[None], teacher_V[None], label, gap, masked=True, block=block)
        torch.testing.assert_close(found_8C, expected_8C, rtol=1e-5, atol=1e-5)
    return expected_8C[:, 0]


@pytest.mark.parametrize("gap", [Gap.STUDENT, Gap.TEACHER])
@pytest.mark.parametrize(("rest", "infinite"), [(0.0, True), (60.0, True), (150.0, False)])
def test_a_token_of_one_alone_counts_only_beside_the_largest_weights(gap: Gap, rest: float, infinite: bool) -> None:
    """The first block's weights look large until later blocks show them to be e^-rest."""
    over_V, under_V = torch.zeros(40), torch.zeros(40)
    under_V[:BLOCK] = -torch.inf
    over_V[BLOCK:32], over_V[32:] = rest / 2, rest
    student_V, teacher_V = (over_V, under_V) if gap is Gap.STUDENT else (under_V, over_V)
    assert bool(measure_one(student_V, teacher_V, gap)[7].isinf()) == infinite


@pytest.mark.parametrize("gap", [Gap.STUDENT, Gap.TEACHER])
def test_columns_barred_by_the_least_number_weigh_nothing(gap: Gap) -> None:
    student_V, teacher_V = torch.linspace(0, 3, 40), torch.linspace(2, -1, 40)
    for logits_V in (student_V, teacher_V):
        logits_V[:20] = torch.finfo(torch.float32).min
    assert measure_one(student_V, teacher_V, gap).isfinite()[4:].all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 20, 36])
def test_a_broken_logit_is_not_hidden(bad: float, column: int) -> None:
    tiles = fixed(1)
    clean_V = tiles.student_CV[0]
    broken_V = clean_V.clone()
    broken_V[column] = bad
    for gap in Gap:
        for student_V, teacher_V, total in ((broken_V, clean_V, 1), (clean_V, broken_V, 5)):
            found_8C = tile_triton.measure(
                student_V[None], teacher_V[None], tiles.labels_C, gap, masked=True, block=BLOCK
            )
            assert found_8C[total].isnan().all()


def test_types_that_are_not_taken() -> None:
    tiles = fixed()
    narrow, wide = tiles.student_CV.bfloat16(), tiles.student_CV.double()
    with pytest.raises(TypeError, match=r"found torch.bfloat16, expected all float32 or all float64"):
        tile_triton.measure(narrow, None, tiles.labels_C, Gap.NONE, masked=True)
    with pytest.raises(TypeError, match=r"found torch.float32 and torch.float64"):
        tile_triton.measure_mixture(tiles.student_CV, wide, tiles.row, masked=True)
    with pytest.raises(TypeError, match=r"out: found torch.float16"):
        tile_triton.gradient_(
            tiles.student_CV, tiles.teacher_CV, tiles.labels_C, tiles.row, masked=True, out=tiles.student_CV.half()
        )


def test_available_to_any_device_here() -> None:
    assert tile_triton.available(torch.device("cpu"))
