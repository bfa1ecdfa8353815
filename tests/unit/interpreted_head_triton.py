"""`tile_triton` and `rows_triton` against their twins, and the head with them, in Triton's interpreter.

`test_head_triton` runs this in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdpg_megatron.head import rows, rows_triton, tile, tile_triton
from sdpg_megatron.head.divergences import Form
from sdpg_megatron.head.rows import Upstream
from sdpg_megatron.head.tile import WeightedLogRatio
from tests.head_tiles import MARGIN, PARTS, Tiles, check_gradient, check_measure, check_mixture, make_tiles
from tests.head_twin import DIVERGENCES, assert_answers, dense, make_problem, package

settings.register_profile("interpreter", deadline=None, derandomize=True)
settings.load_profile("interpreter")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 * -inf, not taken up

BLOCK = 16
CUT_OFF = 1.0
"""The interpreter cuts float32 off to bfloat16. A GPU rounds it: `test_head_triton` looks for that instruction."""
LOG_RATIO_WEIGHTS = [None, *WeightedLogRatio]

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
    student_mix: float = 0.5

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
        return make_tiles(student_CW, teacher_CW, labels_C2[:, 0], seed=self.seed, student_mix=self.student_mix)

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
    student_mix=st.sampled_from([0.5, 0.9]),
)


def fixed(rows: int = 3, columns: int = 37, dtype: torch.dtype = torch.float32) -> Tiles:
    tiles = Case(rows, columns, seed=0).tiles()
    return make_tiles(tiles.student_CW.to(dtype), tiles.teacher_CW.to(dtype), torch.arange(rows) * 18 % max(columns, 1))


@pytest.mark.parametrize("weighted_log_ratio", LOG_RATIO_WEIGHTS)
@settings(max_examples=14)
@given(case=CASES)
def test_measure(weighted_log_ratio: WeightedLogRatio | None, case: Case) -> None:
    check_measure(tile_triton, case.tiles(), weighted_log_ratio, block=BLOCK)


@settings(max_examples=14)
@given(CASES)
def test_mixture(case: Case) -> None:
    check_mixture(tile_triton, case.tiles(), block=BLOCK)


@pytest.mark.parametrize("name", PARTS)
@settings(max_examples=7)
@given(case=CASES, out=st.sampled_from([None, torch.bfloat16, torch.float32]))
def test_gradient(name: str, case: Case, out: torch.dtype | None) -> None:
    through_teacher = "teacher" in PARTS[name]
    # `tile` bounds the teacher's finite log-weights, too, where -inf may occur: none below that bound, then.
    assume(not (through_teacher and case.teacher == "far apart" and case.student_barred + case.teacher_barred))
    check_gradient(tile_triton, case.tiles(same_support=through_teacher), PARTS[name], out, ulp=CUT_OFF, block=BLOCK)


@pytest.mark.parametrize(("rows", "columns"), [(0, 37), (3, 0), (0, 0), (1, 1), (2, BLOCK), (1, BLOCK + 1)])
def test_sizes_at_the_edge(rows: int, columns: int) -> None:
    tiles = fixed(rows, columns)
    for weighted_log_ratio in LOG_RATIO_WEIGHTS:
        check_measure(tile_triton, tiles, weighted_log_ratio, block=BLOCK)
    check_mixture(tile_triton, tiles, block=BLOCK)
    check_gradient(tile_triton, tiles, PARTS["reverse KL"], block=BLOCK)
    check_gradient(tile_triton, tiles, PARTS["forward KL"], torch.bfloat16, ulp=CUT_OFF, block=BLOCK)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0)])
def test_nothing_is_launched_for_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """A grid of no programs is an error on a GPU."""
    for kernel in ("_measure_row", "_measure_mixture_row", "_gradient_block"):
        monkeypatch.setattr(tile_triton, kernel, None)
    tiles = fixed(rows, columns)
    check_measure(tile_triton, tiles, WeightedLogRatio.STUDENT)
    check_mixture(tile_triton, tiles)
    check_gradient(tile_triton, tiles, PARTS["mixture"])


def test_float64() -> None:
    tiles = fixed(dtype=torch.float64)
    for weighted_log_ratio in LOG_RATIO_WEIGHTS:
        check_measure(tile_triton, tiles, weighted_log_ratio, block=BLOCK)
    check_mixture(tile_triton, tiles, block=BLOCK)
    for parts in PARTS.values():
        check_gradient(tile_triton, tiles, parts, block=BLOCK)


def measure_one(student_V: Tensor, teacher_V: Tensor, weighted_log_ratio: WeightedLogRatio) -> Tensor:
    """Statistics [8] of one row, the same by `tile` in float32 and by kernels with one block and with several."""
    label = torch.zeros(1, dtype=torch.int64)
    expected_8C = tile.measure(student_V[None].clone(), teacher_V[None].clone(), label, weighted_log_ratio, masked=True)
    for block in (BLOCK, 64):
        found_8C = tile_triton.measure(
            student_V[None], teacher_V[None], label, weighted_log_ratio, masked=True, block=block
        )
        torch.testing.assert_close(found_8C, expected_8C, rtol=1e-5, atol=1e-5)
    return expected_8C[:, 0]


@pytest.mark.parametrize("weighted_log_ratio", [WeightedLogRatio.STUDENT, WeightedLogRatio.TEACHER])
@pytest.mark.parametrize(("rest", "infinite"), [(0.0, True), (60.0, True), (150.0, False)])
def test_a_token_of_one_alone_counts_only_beside_the_largest_weights(
    weighted_log_ratio: WeightedLogRatio, rest: float, infinite: bool
) -> None:
    """The first block's weights look large until later blocks show them to be e^-rest."""
    over_V, under_V = torch.zeros(40), torch.zeros(40)
    under_V[:BLOCK] = -torch.inf
    over_V[BLOCK:32], over_V[32:] = rest / 2, rest
    student_V, teacher_V = (over_V, under_V) if weighted_log_ratio is WeightedLogRatio.STUDENT else (under_V, over_V)
    assert bool(measure_one(student_V, teacher_V, weighted_log_ratio)[6].isinf()) == infinite


@pytest.mark.parametrize("weighted_log_ratio", [WeightedLogRatio.STUDENT, WeightedLogRatio.TEACHER])
def test_columns_barred_by_the_least_number_weigh_nothing(weighted_log_ratio: WeightedLogRatio) -> None:
    student_V, teacher_V = torch.linspace(0, 3, 40), torch.linspace(2, -1, 40)
    for logits_V in (student_V, teacher_V):
        logits_V[:20] = torch.finfo(torch.float32).min
    assert measure_one(student_V, teacher_V, weighted_log_ratio).isfinite()[4:].all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 20, 36])
def test_a_broken_logit_is_not_hidden(bad: float, column: int, masked: bool) -> None:
    tiles = fixed(1)
    clean_V = tiles.student_CV[0]
    broken_V = clean_V.clone()
    broken_V[column] = bad
    for weighted_log_ratio in WeightedLogRatio:
        for student_V, teacher_V, total in ((broken_V, clean_V, 1), (clean_V, broken_V, 5)):
            found_8C = tile_triton.measure(
                student_V[None], teacher_V[None], tiles.labels_C, weighted_log_ratio, masked=masked, block=BLOCK
            )
            assert found_8C[total].isnan().all()


@pytest.mark.parametrize("column", [0, 20, 36])
def test_a_logit_of_minus_infinity_is_broken_where_none_is_looked_for(column: int) -> None:
    """It comes of a broken weight there. The student's makes B not a number, the teacher's D."""
    tiles = fixed(1)
    broken_V = tiles.student_CV[0].clone()
    broken_V[column] = -torch.inf
    for student_V, teacher_V, number in ((broken_V, tiles.teacher_CV[0], 2), (tiles.student_CV[0], broken_V, 6)):
        found_8C = tile_triton.measure(
            student_V[None], teacher_V[None], tiles.labels_C, WeightedLogRatio.STUDENT, masked=False, block=BLOCK
        )
        assert not found_8C[number].isfinite().any()


def test_types_that_are_not_taken() -> None:
    tiles = fixed()
    narrow, wide = tiles.student_CV.bfloat16(), tiles.student_CV.double()
    with pytest.raises(TypeError, match=r"found torch.bfloat16, expected all float32 or all float64"):
        tile_triton.measure(narrow, None, tiles.labels_C, WeightedLogRatio.NONE, masked=True)
    with pytest.raises(TypeError, match=r"found torch.float32 and torch.float64"):
        tile_triton.measure_mixture(tiles.student_CV, wide, tiles.row, masked=True)
    with pytest.raises(TypeError, match=r"out: found torch.float16"):
        tile_triton.gradient_(
            tiles.student_CV, tiles.teacher_CV, tiles.labels_C, tiles.row, masked=True, out=tiles.student_CV.half()
        )


def test_available_to_any_device_here() -> None:
    assert tile_triton.available(torch.device("cpu"))


# --- numbers of rows

CLOSED = [name for name, divergence in DIVERGENCES.items() if divergence.form is not Form.NONE]
EXACT = {"rtol": 1e-13, "atol": 1e-13}


def statistics(
    ranks: int, size: int, weighted_log_ratio: WeightedLogRatio, *, has_teacher: bool = True, seed: int = 0
) -> Tensor:
    """Of so many shards of random logits, float64 [R, K, C]; some shards hold nothing but -inf on some rows."""
    generator = torch.Generator().manual_seed(seed)
    student_CV, teacher_CV = 5 * torch.randn(2, size, 7 * ranks, generator=generator, dtype=torch.float64)
    student_CV[::3, :7] = teacher_CV[::3, :7] = -torch.inf
    student_CV[1::3, -7:] -= 2000
    labels_C = torch.randint(7 if ranks > 1 else 0, 7 * ranks, (size,), generator=generator)
    parts = [
        tile.measure(
            student_CV[:, at : at + 7],
            teacher_CV[:, at : at + 7] if has_teacher else None,
            labels_C - at,
            weighted_log_ratio,
            masked=True,
        )
        for at in range(0, 7 * ranks, 7)
    ]
    return torch.stack(parts)


def numbers(name: str, size: int, *, has_teacher: bool = True) -> Tensor:
    """What is kept of rows, float64 [N, C]: statistics, and two positive numbers for a mixture."""
    divergence = DIVERGENCES[name]
    sums_KC = rows.join(
        statistics(2, size, divergence.weighted_log_ratio, has_teacher=has_teacher), divergence.weighted_log_ratio
    )
    if divergence.student_mix is None or not has_teacher:
        return sums_KC
    return torch.cat((sums_KC, torch.rand(2, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)))


@pytest.mark.parametrize("weighted_log_ratio", LOG_RATIO_WEIGHTS)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 200])
def test_join(weighted_log_ratio: WeightedLogRatio | None, ranks: int, size: int) -> None:
    """Also as a gather hands them over: with numbers of the divergence behind those of each rank."""
    parts_RKC = statistics(
        ranks, size, weighted_log_ratio or WeightedLogRatio.NONE, has_teacher=weighted_log_ratio is not None
    )
    wide_RNC = torch.cat((parts_RKC, torch.full_like(parts_RKC[:, :3], torch.nan)), 1)
    for given_RKC in (parts_RKC, wide_RNC[:, : parts_RKC.shape[1]]):
        found_KC = rows_triton.join(given_RKC, weighted_log_ratio or WeightedLogRatio.NONE)
        torch.testing.assert_close(found_KC, rows.join(parts_RKC, weighted_log_ratio or WeightedLogRatio.NONE), **EXACT)


def test_join_of_shards_that_the_other_side_lacks() -> None:
    """D of one shard is infinite, and its weights vanish in the whole; then they do not."""
    parts_RKC = statistics(2, 4, WeightedLogRatio.STUDENT)
    parts_RKC[0, 6] = torch.inf
    parts_RKC[0, 0] = parts_RKC[1, 0] - torch.tensor([2000, 2000, 0, 1])
    found_KC = rows_triton.join(parts_RKC, WeightedLogRatio.STUDENT)
    assert found_KC[6].isinf().tolist() == [False, False, True, True]
    torch.testing.assert_close(found_KC, rows.join(parts_RKC, WeightedLogRatio.STUDENT), **EXACT)


@pytest.mark.parametrize("name", [None, *CLOSED])
@pytest.mark.parametrize("size", [1, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_terms(name: str | None, size: int, dtype: torch.dtype) -> None:
    divergence = DIVERGENCES[name or "reverse_kl"]
    sums_NC = numbers(name or "reverse_kl", size, has_teacher=name is not None)
    found_4T, expected_4T = (torch.full((4, size + 20), 7.0, dtype=dtype) for _ in range(2))
    for functions, terms_4T in ((rows_triton, found_4T), (rows, expected_4T)):
        functions.terms(sums_NC, divergence, terms_4T[:, 3 : 3 + size])
    torch.testing.assert_close(found_4T, expected_4T, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=1e-13)
    assert found_4T[:, :3].eq(7).all() and found_4T[:, 3 + size :].eq(7).all()


@pytest.mark.parametrize("name", [None, *CLOSED])
@pytest.mark.parametrize("given", [(0, 1, 2), (0,), (1,), (2,), (0, 2), ()])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_coefficients(name: str | None, given: tuple[int, ...], temperature: float) -> None:
    """`given`: the terms with an upstream gradient, one of them expanded from a single number."""
    size, divergence = 200, DIVERGENCES[name or "reverse_kl"]
    sums_NC = numbers(name or "reverse_kl", size, has_teacher=name is not None)
    random_3C = torch.randn(3, size, generator=torch.Generator().manual_seed(2))
    every = (random_3C[0], random_3C[1], torch.tensor(0.3).expand(size))
    upstream: Upstream = tuple(every[term] if term in given else None for term in range(3))  # type: ignore[assignment]
    found, expected = (
        functions.coefficients(sums_NC, divergence, upstream, temperature, torch.float64).row
        for functions in (rows_triton, rows)
    )
    for part in rows_triton.PARTS:
        found_C, expected_C = getattr(found, part), getattr(expected, part)
        assert (found_C is None) == (expected_C is None), part
        if expected_C is not None:
            torch.testing.assert_close(found_C, expected_C, rtol=1e-12, atol=1e-12, msg=part)
    assert found.student_mix == expected.student_mix


# --- the whole head


@pytest.mark.parametrize("way", ["logits", "recompute", "grad_in_forward"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_answers_are_the_twins(way: str, name: str) -> None:
    """As on a GPU: gradients of several chunks in one product."""
    problem = make_problem(divergence=DIVERGENCES[name], temperature=0.6)
    sizes: dict[str, int | None] = {"tile_columns": None, "group_rows": 9}
    found = package(way, problem, kernels="triton", **sizes)
    assert_answers(found, dense(problem), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (3, 4096)])
def test_scaled_numbers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    numbers = torch.arange(float(shape[0] * shape[1])).view(shape) / 16
    found = tile_triton.scaled(numbers, torch.tensor(2.0), dtype)
    expected = (2 * numbers).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0 if dtype == torch.float32 else 2**-7, atol=0)
