"""The head on one rank against its dense float64 twin: all ways to ask for its terms, all divergences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.head import HeadOptions, HeadTerms, VocabShard, head_logprobs, head_terms, logits_terms
from tests.head_twin import (
    DIVERGENCES,
    WAYS,
    Problem,
    ask,
    assert_answers,
    dense,
    dense_of_logits,
    dense_terms,
    logits_problem,
    make_problem,
    options_of,
    package,
)

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SINGLE = {"rtol": 2e-5, "atol": 2e-5}
TEMPERATURES = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.6, "teacher_temperature": 1.5},
    {"teacher_temperature": 1.5},
]

ways = pytest.mark.parametrize("way", WAYS)
names = pytest.mark.parametrize("name", DIVERGENCES)


@ways
@names
@pytest.mark.parametrize("temperatures", TEMPERATURES)
def test_answers_are_the_twins(way: str, name: str, temperatures: dict[str, float]) -> None:
    """With all terms in the loss, and with each alone."""
    problem = make_problem(divergence=DIVERGENCES[name], **temperatures)
    for asked in (problem, *map(problem.alone, range(3))):
        assert_answers(package(way, asked), dense(asked), **EXACT)


@ways
@names
def test_a_teacher_with_a_matrix_of_its_own(way: str, name: str) -> None:
    problem = make_problem(teacher_hidden=4, divergence=DIVERGENCES[name], temperature=0.6, teacher_temperature=1.5)
    assert_answers(package(way, problem), dense(problem), **EXACT)


@ways
@names
def test_sizes_of_chunks_and_tiles_change_nothing(way: str, name: str) -> None:
    """11 rows, 5 of them with a teacher, and 21 columns: few of these sizes divide them."""
    problem = make_problem(divergence=DIVERGENCES[name], temperature=0.6)
    expected = dense(problem)
    for rows, columns in ((1, 1), (4, 21), (3, 8), (11, 2), (256, 7), (2, 4096), (None, None)):
        assert_answers(package(way, problem, chunk_rows=rows, tile_columns=columns), expected, **EXACT)


@names
def test_one_product_of_several_chunks_changes_nothing(name: str) -> None:
    """As on a GPU. Groups hold one chunk, some, or all of them; shared products and those of two temperatures."""
    for temperatures in ({"temperature": 0.6}, {"temperature": 0.6, "teacher_temperature": 1.5}):
        problem = make_problem(divergence=DIVERGENCES[name], **temperatures)
        expected = dense(problem)
        for rows, columns, group in ((1, 24, 1), (2, 5, 4), (2, 24, 7), (4, 24, 100), (100, 24, 100), (None, None, 8)):
            sizes = {"chunk_rows": rows, "tile_columns": columns, "group_rows": group}
            assert_answers(package("grad_in_forward", problem, **sizes), expected, **EXACT)
    own = make_problem(teacher_hidden=4, divergence=DIVERGENCES[name])
    assert_answers(package("grad_in_forward", own, group_rows=6), dense(own), **EXACT)


@pytest.mark.parametrize("wanted", ["hidden_TH", "weight_VH"])
def test_only_wanted_gradients_of_several_chunks_are_made(wanted: str) -> None:
    problem = make_problem()
    leaf = getattr(problem, wanted).clone().requires_grad_()
    _, loss = ask("grad_in_forward", replace(problem, **{wanted: leaf}), group_rows=8)
    loss.backward()
    expected = dense(problem)
    answers = {"hidden_TH": expected.hidden_grad_TH, "weight_VH": expected.weight_grad_VH}
    assert_close(leaf.grad, answers[wanted], **EXACT)


def test_kept_gradients_are_rounded_to_the_weights_type_alone() -> None:
    """bfloat16 weights: each logit's gradient is off by half a unit, and no sum of them by more than that."""
    problem = make_problem(rows=40, columns=300, valid=290, hidden=64, gated=30).to(torch.bfloat16)
    found = package("grad_in_forward", problem, chunk_rows=8, tile_columns=290, group_rows=20)
    exact = problem.to(torch.float64)
    logits_TV = (exact.hidden_TH @ exact.weight_VH[:290].T).requires_grad_()
    loss = exact.loss(dense_terms(exact, logits_TV), torch.arange(40)).sum()
    (gradient_TV,) = torch.autograd.grad(loss, logits_TV)
    half = torch.finfo(torch.bfloat16).eps / 2
    hidden_bound_TH = half * (gradient_TV.abs() @ exact.weight_VH[:290].abs())
    weight_bound_VH = half * (gradient_TV.abs().T @ exact.hidden_TH.abs())
    expected = dense(problem)
    assert_close(found.terms_4T.double(), expected.terms_4T, **SINGLE)
    off_TH = (found.hidden_grad_TH.double() - expected.hidden_grad_TH).abs()
    off_VH = (found.weight_grad_VH.double() - expected.weight_grad_VH).abs()[:290]
    assert (off_TH <= hidden_bound_TH + half * expected.hidden_grad_TH.abs() + 1e-5).all()
    assert (off_VH <= weight_bound_VH + half * expected.weight_grad_VH[:290].abs() + 1e-5).all()


# --- finite differences: the teacher has a matrix of its own, so that nudging the student's leaves it alone


def small_problem(name: str) -> Problem:
    return make_problem(
        rows=4, columns=7, valid=6, hidden=3, gated=2, teacher_hidden=2, divergence=DIVERGENCES[name], temperature=0.7
    )


DIFFERENTIABLE = [name for name in DIVERGENCES if name != "sampled_token"]
"""The gradient of the sampled token's is not that of its value."""


@pytest.mark.parametrize("way", ["terms", "logits"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck_of_every_term(way: str, name: str) -> None:
    problem = small_problem(name)

    def terms(hidden_TH: Tensor, weight_VH: Tensor) -> tuple[Tensor | None, ...]:
        found, _ = ask(way, replace(problem, hidden_TH=hidden_TH, weight_VH=weight_VH), chunk_rows=3, tile_columns=4)
        return found.logprob_T, found.entropy_T, found.divergence_T

    leaves = problem.hidden_TH.requires_grad_(), problem.weight_VH.requires_grad_()
    assert torch.autograd.gradcheck(terms, leaves)


@ways
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_slopes_of_a_loss(way: str, name: str) -> None:
    """Along random directions, since `gradcheck` runs each graph twice, which one schedule does not allow."""
    problem = small_problem(name)
    generator = torch.Generator().manual_seed(1)
    for asked in (problem, *map(problem.alone, range(3))):
        answer = package(way, asked)
        for field, gradient in (("hidden_TH", answer.hidden_grad_TH), ("weight_VH", answer.weight_grad_VH)):
            base = getattr(asked, field)
            step = 1e-5 * torch.randn(base.shape, generator=generator, dtype=base.dtype)
            above, below = (package(way, replace(asked, **{field: base + s * step})).loss for s in (1, -1))
            assert_close((gradient * step).sum(), (above - below) / 2, rtol=1e-6, atol=1e-12)


# --- the teacher


@ways
@names
def test_the_teacher_gets_no_gradient_though_its_matrix_is_the_students(way: str, name: str) -> None:
    """One matrix embeds the inputs of both and puts out both: its gradient is the student's alone."""
    problem = make_problem(divergence=DIVERGENCES[name], temperature=0.6)
    tokens_T = torch.randint(0, problem.valid, (11,), generator=torch.Generator().manual_seed(3))
    weight_VH = problem.weight_VH.clone().requires_grad_()
    teacher_GH = weight_VH[tokens_T[problem.rows_G]].sin()
    teacher_GH.retain_grad()
    tied = replace(problem, weight_VH=weight_VH, hidden_TH=weight_VH[tokens_T].tanh(), teacher_GH=teacher_GH)
    terms, loss = ask(way, tied)
    loss.backward()
    assert teacher_GH.grad is None
    assert terms.teacher_logprob_T is not None and not terms.teacher_logprob_T.requires_grad

    alone = problem.weight_VH.clone().requires_grad_()
    exact = replace(problem, weight_VH=alone, teacher_GH=teacher_GH.detach())
    logits_TV = alone[tokens_T].tanh() @ alone[: problem.valid].T
    assert_close(weight_VH.grad, dense_of_logits(exact, logits_TV, (alone, alone)).weight_grad_VH, **EXACT)


@pytest.mark.parametrize("way", ["terms", "recompute", "grad_in_forward"])
def test_a_teachers_own_matrix_gets_no_gradient(way: str) -> None:
    problem = make_problem(teacher_hidden=4)
    own_VH = problem.teacher_weight_VH
    assert own_VH is not None
    leaf = replace(problem, teacher_weight_VH=own_VH.requires_grad_(), hidden_TH=problem.hidden_TH.requires_grad_())
    _, loss = ask(way, leaf)
    loss.backward()
    assert own_VH.grad is None and leaf.hidden_TH.grad is not None


@ways
@pytest.mark.parametrize("rows_G", [[], [10], [0, 1, 2], [10, 9, 8], [7, 0, 3, 10], list(range(10, -1, -1))])
def test_teachers_on_any_rows_in_any_order(way: str, rows_G: list[int]) -> None:
    problem = make_problem(gated=len(rows_G))
    holed = replace(problem, rows_G=torch.tensor(rows_G, dtype=torch.int64))
    found = package(way, holed)
    assert_answers(found, dense(holed), **EXACT)
    without = [row for row in range(11) if row not in rows_G]
    assert found.terms_4T[2:, without].eq(0).all()


# --- types


@ways
@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_accumulate_in_float32(way: str, name: str, dtype: torch.dtype) -> None:
    """Against float64 of the same values. bfloat16 gradients are rounded once, when they are handed back."""
    problem = make_problem(rows=40, columns=1000, valid=990, hidden=64, gated=30, divergence=DIVERGENCES[name])
    if way == "logits":
        logits_TV = (problem.hidden_TH @ problem.weight_VH[:990].T).to(dtype)
        teacher_GV = (problem.teacher_GH @ problem.weight_VH[:990].T).to(dtype)
        # Logits rounded to 8 bits are often equal, and then which of them is among the top k is anyone's guess.
        spread_V = torch.linspace(0, 3, 990).to(dtype)[torch.randperm(990, generator=torch.Generator().manual_seed(2))]
        students_TV = spread_V.expand_as(logits_TV) if name.startswith("top3") else logits_TV
        every = logits_problem(students_TV, teacher_GV, problem.labels_T, divergence=problem.divergence)
        problem = replace(every, rows_G=problem.rows_G, upstream_3T=problem.upstream_3T)
    narrow = problem.to(dtype)
    expected = dense(narrow)
    found = package(way, narrow, chunk_rows=16, tile_columns=333)
    assert found.terms_4T.dtype == found.loss.dtype == torch.float32
    assert found.hidden_grad_TH.dtype == found.weight_grad_VH.dtype == dtype
    assert_close(found.terms_4T.double(), expected.terms_4T, **SINGLE)
    rounding = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else SINGLE
    assert_close(found.hidden_grad_TH.double(), expected.hidden_grad_TH, **rounding)
    if way != "logits":  # the identity matrix of that case is the test's own
        assert_close(found.weight_grad_VH.double(), expected.weight_grad_VH, **rounding)


# --- padding and rows that do not count


@ways
@names
@pytest.mark.parametrize("padding", [0.0, 1e4, torch.nan])
def test_padding_never_counts(way: str, name: str, padding: float) -> None:
    problem = make_problem(divergence=DIVERGENCES[name])
    found = package(way, problem.padded(padding))
    assert_answers(found, dense(problem), **EXACT)
    assert found.weight_grad_VH[problem.valid :].eq(0).all()


@ways
def test_padding_of_a_teachers_own_matrix_never_counts(way: str) -> None:
    problem = make_problem(teacher_hidden=4)
    assert problem.teacher_weight_VH is not None
    padded_VH = problem.teacher_weight_VH.clone()
    padded_VH[problem.valid :] = torch.nan
    assert_answers(package(way, replace(problem, teacher_weight_VH=padded_VH)), dense(problem), **EXACT)


@ways
@names
def test_an_empty_response_gives_connected_zero_gradients(way: str, name: str) -> None:
    found = package(way, make_problem(rows=0, gated=0, divergence=DIVERGENCES[name]))
    assert found.terms_4T.shape == (4, 0)
    assert found.loss == 0
    assert found.hidden_grad_TH.shape == (0, 6)
    assert found.weight_grad_VH.shape == (24, 6) and found.weight_grad_VH.eq(0).all()


@ways
@names
@pytest.mark.parametrize("gated", [0, 1])
def test_a_single_token(way: str, name: str, gated: int) -> None:
    problem = make_problem(rows=1, gated=gated, divergence=DIVERGENCES[name])
    assert_answers(package(way, problem), dense(problem), **EXACT)


@ways
@names
def test_a_vocabulary_of_one_token(way: str, name: str) -> None:
    problem = make_problem(columns=3, valid=1, divergence=DIVERGENCES[name])
    found = package(way, problem)
    assert found.terms_4T.abs().max() <= 1e-6 and found.hidden_grad_TH.abs().max() <= 1e-6


@ways
def test_a_masked_micro_batch_gives_zeros(way: str) -> None:
    problem = make_problem()
    found = package(way, replace(problem, upstream_3T=torch.zeros(3, 11, dtype=torch.float64)))
    assert found.loss == 0
    assert found.hidden_grad_TH.eq(0).all() and found.weight_grad_VH.eq(0).all()


@ways
def test_rows_without_an_upstream_gradient_might_as_well_not_be_there(way: str) -> None:
    problem = make_problem()
    kept_T = torch.arange(11) % 3 != 0
    masked = replace(problem, upstream_3T=problem.upstream_3T * kept_T)
    found = package(way, masked)
    assert found.hidden_grad_TH[~kept_T].eq(0).all()
    assert_answers(found, dense(masked), **EXACT)


@ways
def test_masked_rows_are_not_handed_over_whatever_they_hold(way: str) -> None:
    """As the forward step gathers them: NaN where a position predicts no response token."""
    problem = make_problem()
    positions_T = torch.arange(11) * 2 + 1
    whole_SH = torch.full((24, 6), torch.nan, dtype=torch.float64)
    whole_SH[positions_T] = problem.hidden_TH
    whole_SH.requires_grad_()
    _, loss = ask(way, replace(problem, hidden_TH=whole_SH.index_select(0, positions_T)))
    (gradient_SH,) = torch.autograd.grad(loss, whole_SH)
    assert_close(gradient_SH[positions_T], dense(problem).hidden_grad_TH, **EXACT)
    assert gradient_SH[::2].eq(0).all()


# --- what is asked for, and what is left alone


@ways
@pytest.mark.parametrize("wanted", ["hidden_TH", "weight_VH"])
def test_only_wanted_gradients_are_made(way: str, wanted: str) -> None:
    problem = make_problem()
    leaf = getattr(problem, wanted).clone().requires_grad_()
    _, loss = ask(way, replace(problem, **{wanted: leaf}))
    loss.backward()
    expected = dense(problem)
    answers = {"hidden_TH": expected.hidden_grad_TH, "weight_VH": expected.weight_grad_VH}
    assert_close(leaf.grad, answers[wanted], **EXACT)


def test_logprobs_alone_are_the_same_bits_without_a_graph() -> None:
    problem = make_problem(temperature=0.7).to(torch.float32)
    weight_VH = problem.weight_VH.requires_grad_()
    vocab, options = VocabShard(0, problem.valid, None), options_of(problem)
    alone_T = head_logprobs(problem.hidden_TH, weight_VH, problem.labels_T, vocab=vocab, options=options)
    terms = head_terms(problem.hidden_TH, weight_VH, problem.labels_T, vocab=vocab, options=options)
    assert torch.equal(alone_T, terms.logprob_T)
    assert not alone_T.requires_grad
    assert terms.divergence_T is None and terms.teacher_logprob_T is None


@ways
@names
def test_inputs_come_back_unmodified(way: str, name: str) -> None:
    problem, before = (make_problem(teacher_hidden=4, divergence=DIVERGENCES[name]) for _ in range(2))
    leaf = replace(problem, hidden_TH=problem.hidden_TH.requires_grad_(), weight_VH=problem.weight_VH.requires_grad_())
    _, loss = ask(way, leaf)
    loss.backward()
    for field, value in vars(before).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(problem, field), value), field


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_given_logits_come_back_unmodified(dtype: torch.dtype) -> None:
    student_TV, teacher_TV = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    given_TV, given_teacher_TV = student_TV.clone().requires_grad_(), teacher_TV.clone()
    options = HeadOptions(chunk_rows=2, tile_columns=4)
    vocab = VocabShard(0, 8, None)
    terms = logits_terms(given_TV, torch.arange(5), vocab=vocab, teacher_GV=given_teacher_TV, options=options)
    assert terms.divergence_T is not None
    (terms.logprob_T + terms.entropy_T + terms.divergence_T).sum().backward()
    assert torch.equal(given_TV, student_TV) and torch.equal(given_teacher_TV, teacher_TV)


def test_given_logits_without_a_teacher() -> None:
    problem = make_problem()
    logits_TV = problem.hidden_TH @ problem.weight_VH.T
    terms = logits_terms(logits_TV, problem.labels_T, vocab=VocabShard(0, problem.valid, None))
    assert terms.divergence_T is None and terms.teacher_logprob_T is None
    assert_close(torch.stack((terms.logprob_T, terms.entropy_T)), dense(problem).terms_4T[:2], **EXACT)


def test_terms_detached_have_no_graph() -> None:
    problem = make_problem()
    terms, _ = ask("terms", replace(problem, hidden_TH=problem.hidden_TH.requires_grad_()))
    detached = terms.detached()
    for name in HeadTerms.__slots__:
        assert torch.equal(getattr(detached, name), getattr(terms, name))
        assert not getattr(detached, name).requires_grad


# --- any shape


@st.composite
def questions(draw: Any) -> tuple[Problem, dict[str, int]]:
    rows = draw(st.integers(0, 9))
    columns = draw(st.integers(1, 30))
    temperature = draw(st.sampled_from([0.5, 1.0, 2.0]))
    problem = make_problem(
        rows=rows,
        columns=columns,
        valid=draw(st.integers(1, columns)),
        hidden=draw(st.integers(1, 5)),
        gated=draw(st.integers(0, rows)),
        seed=draw(st.integers(0, 2**20)),
        teacher_hidden=draw(st.sampled_from([None, 3])),
        divergence=DIVERGENCES[draw(st.sampled_from(sorted(DIVERGENCES)))],
        temperature=temperature,
        teacher_temperature=draw(st.sampled_from([None, 0.7])),
    )
    padded = problem.padded(draw(st.sampled_from([0.0, 1e4, torch.nan])))
    return padded, {"chunk_rows": draw(st.integers(1, 10)), "tile_columns": draw(st.integers(1, 31))}


@settings(deadline=None, max_examples=100, derandomize=True)
@given(questions(), st.sampled_from(WAYS))
def test_any_shape(question: tuple[Problem, dict[str, int]], way: str) -> None:
    problem, sizes = question
    assert_answers(package(way, problem, **sizes), dense(problem.padded(0.0)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name.startswith("top3")])
def test_all_tokens_may_be_among_the_top_ones(name: str, columns: int) -> None:
    """The probability of all other tokens is then the constant floor, which has no gradient."""
    problem = make_problem(columns=columns, valid=columns, divergence=DIVERGENCES[name])
    assert_answers(package("terms", problem), dense(problem), rtol=1e-12, atol=1e-12)
