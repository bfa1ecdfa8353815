"""Logits at the ends of what float32 holds, distributions that are equal or have nothing in common, and -inf."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.errors import NumericsError
from sdpg_megatron.head import TopK, VocabShard, head_logprobs, logits_terms
from tests.head_twin import (
    DIVERGENCES,
    WAYS,
    WHOLE,
    Answer,
    Problem,
    assert_answers,
    dense,
    dense_of_logits,
    logits_problem,
    make_problem,
    options_of,
    package,
)

EXACT = {"rtol": 1e-11, "atol": 1e-11}
HIDDEN_WAYS = [way for way in WAYS if way != "logits"]

ways = pytest.mark.parametrize("way", WAYS)
names = pytest.mark.parametrize("name", DIVERGENCES)

# Student and teacher, one row each. All numbers and their sums with an offset are exact in float32.
EXTREMES: dict[str, tuple[list[float], list[float]]] = {
    "+-1e4": ([1e4, -1e4, 0.0, 1.0], [2.0, 1e4, 0.0, 1.0]),
    "a teacher at 1e4": ([3.0, 2.0, 1.0, 0.5], [1.0, 1e4, 0.0, -4.0]),
    "a student at 1e4": ([1.0, 1e4, 0.0, -4.0], [3.0, 2.0, 1.0, 0.5]),
    "all below -100": ([-150.0, -151.5, -153.25, -149.0], [-201.0, -200.5, -203.0, -207.25]),
    "one-hot": ([0.0, -1e4, -1.1e4, -1.2e4], [0.0, -1e4, -1.1e4, -1.2e4]),
    "disjoint": ([1e4, 0.0, 1.0, 2.0], [0.0, 1e4, 1.0, 2.0]),
    "disjoint beyond 1000": ([0.0, -1500.0, -3000.0, -3500.0], [-1500.0, 0.0, -3000.0, -3500.0]),
    "KL over 20": ([0.0, -0.5, -30.0, -40.0], [-35.0, -30.5, 0.0, -0.25]),
    "KL over 80": ([0.0, -0.5, -130.0, -140.0], [-135.0, -130.5, 0.0, -0.25]),
}


@ways
@names
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits_in_float32(way: str, name: str, case: str) -> None:
    """As they are, and with an offset common to all of a row's; all in one tile, and in several."""
    for offset, columns in ((0.0, 1), (1e3, 3), (-1e3, 3), (0.0, 8)):
        problem = extreme(case, name, offset)
        expected = dense(problem)
        found = package(way, problem, tile_columns=columns, chunk_rows=3)
        assert_close(found.terms_4T.double(), expected.terms_4T, rtol=1e-6, atol=1e-6)
        if isinstance(problem.divergence, TopK):
            # Where the tail is at its floor, autograd stops there, while the head goes on as if it were above.
            assert found.hidden_grad_TH.isfinite().all() and found.weight_grad_VH.isfinite().all()
        else:
            assert_answers(found, expected, rtol=1e-5, atol=2e-5)


def extreme(case: str, name: str, offset: float) -> Problem:
    """The case's row four times, each with another label."""
    student_V, teacher_V = (torch.tensor(row) for row in EXTREMES[case])
    student_TV, teacher_TV = (student_V + offset).expand(4, 4), (teacher_V - offset).expand(4, 4)
    problem = logits_problem(student_TV, teacher_TV, torch.arange(4), divergence=DIVERGENCES[name])
    return replace(problem, rows_G=torch.tensor([2, 0, 3, 1]))


def test_the_extremes_are_what_they_are_called() -> None:
    for case, (student_V, teacher_V) in EXTREMES.items():
        pair = torch.tensor([[student_V], [teacher_V]], dtype=torch.float64)
        divergence = float(dense(logits_problem(*pair, torch.tensor([0]))).terms_4T[2])
        least = {"disjoint": 9999, "disjoint beyond 1000": 1499, "KL over 20": 20, "KL over 80": 80}.get(case, 0)
        assert divergence >= least, case


@ways
@pytest.mark.parametrize("name", [*WHOLE, "top3_reverse_kl", "top3_forward_kl", "top3_jsd", "sampled_token"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_same_distribution_has_no_divergence(way: str, name: str, scale: float) -> None:
    problem = make_problem(gated=11, divergence=DIVERGENCES[name]).to(torch.float32)
    problem = replace(problem, hidden_TH=scale * problem.hidden_TH)
    if way == "logits":  # the same logits on both sides: two products of other shapes need not round alike
        problem = with_logits(problem)
    same = replace(problem, teacher_GH=problem.hidden_TH[problem.rows_G]).alone(2)
    found = package(way, same)
    assert found.terms_4T[2].abs().max() <= 1e-6
    assert found.hidden_grad_TH.abs().max() <= 1e-5 and found.weight_grad_VH.abs().max() <= 1e-5 * scale


def with_logits(problem: Problem) -> Problem:
    """The problem with its logits for hidden rows; the matrix is the identity, whose products are exact."""
    logits_TV = problem.hidden_TH @ problem.weight_VH.T
    return replace(problem, hidden_TH=logits_TV, weight_VH=torch.eye(logits_TV.shape[1], dtype=logits_TV.dtype))


@ways
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("noise", [1e-4, 1e-3])
def test_a_divergence_is_not_negative_near_zero(way: str, name: str, noise: float) -> None:
    problem = make_problem(rows=200, columns=4000, valid=4000, hidden=32, gated=200, divergence=DIVERGENCES[name])
    noise_GH = noise * torch.randn(200, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    near = replace(problem, teacher_GH=problem.hidden_TH[problem.rows_G] + noise_GH).to(torch.float32)
    assert package(way, near, chunk_rows=64, tile_columns=1024).terms_4T[2].min() >= -1e-6


# --- logits of -inf, which a caller's own logits may hold

INF = torch.inf
LOGITS = (
    torch.tensor([[1.0, 0.5, -2.0, 0.25, 3.0, -1.0, 2.0], [0.0, -0.5, 2.5, 1.25, -3.0, 1.0, 0.75]]).double(),
    torch.tensor([[0.0, 1.5, 2.0, -0.25, 0.5, -2.0, 1.0], [1.0, 3.5, 0.5, 2.25, -1.0, 2.0, 0.25]]).double(),
)
LABELS = torch.tensor([3, 6])
BARRED = [1, 2, 5]
"""The first tile of two columns holds some of either kind, and with tiles of one column some have none but -inf."""


def of_logits(problem: Problem, tile_columns: int) -> Answer:
    """`logits_terms` of the very logits, as a product with an infinite one would be NaN."""
    logits_TV = problem.hidden_TH.clone().requires_grad_()
    terms = logits_terms(
        logits_TV,
        problem.labels_T,
        vocab=VocabShard(0, problem.valid, None),
        teacher_GV=problem.teacher_GH,
        rows_G=problem.rows_G,
        options=options_of(problem, tile_columns=tile_columns),
    )
    loss = problem.loss(terms, torch.arange(len(problem.labels_T))).sum()
    assert terms.divergence_T is not None and terms.teacher_logprob_T is not None
    terms_4T = torch.stack((terms.logprob_T, terms.entropy_T, terms.divergence_T, terms.teacher_logprob_T)).detach()
    (gradient_TV,) = torch.autograd.grad(loss, logits_TV)
    return Answer(terms_4T, gradient_TV, torch.zeros(()), loss.detach())


def twin_of_logits(problem: Problem) -> Answer:
    logits_TV = problem.hidden_TH.clone().requires_grad_()
    eye_VH = torch.eye(problem.valid, dtype=torch.float64)
    exact = replace(problem, weight_VH=eye_VH, teacher_weight_VH=None)
    found = dense_of_logits(_with_finite_products(exact), logits_TV, (logits_TV, logits_TV))
    return Answer(found.terms_4T, found.hidden_grad_TH, torch.zeros(()), found.loss)


def _with_finite_products(problem: Problem) -> Problem:
    """-inf as a number that is as good in float64, and with which a product is not NaN."""
    return replace(problem, teacher_GH=problem.teacher_GH.clamp(min=-1e9))


def barred(student: bool, teacher: bool, name: str) -> Problem:
    student_TV, teacher_TV = (logits_TV.clone() for logits_TV in LOGITS)
    if student:
        student_TV[:, BARRED] = -INF
    if teacher:
        teacher_TV[:, BARRED] = -INF
    return logits_problem(student_TV, teacher_TV, LABELS, divergence=DIVERGENCES[name], temperature=0.5)


tiles = pytest.mark.parametrize("tile_columns", [1, 2, 7])


@names
@tiles
def test_a_token_that_neither_can_produce_contributes_nothing(name: str, tile_columns: int) -> None:
    problem = barred(True, True, name)
    found = of_logits(problem, tile_columns)
    kept = [v for v in range(7) if v not in BARRED]
    small = replace(
        logits_problem(LOGITS[0][:, kept], LOGITS[1][:, kept], torch.tensor([1, 3]), divergence=problem.divergence),
        temperature=0.5,
    )
    expected = twin_of_logits(small)
    assert_close(found.terms_4T, expected.terms_4T, **EXACT)
    assert_close(found.hidden_grad_TH[:, kept], expected.hidden_grad_TH, **EXACT)
    assert found.hidden_grad_TH[:, BARRED].eq(0).all()


@names
@tiles
def test_a_token_that_only_the_teacher_rules_out(name: str, tile_columns: int) -> None:
    problem = barred(False, True, name)
    # None of them is among the first row's top 3.
    faults = {"reverse_kl": "row 0 of 2: .* at label 3", "top3_reverse_kl": "row 1 of 2: .* divergence inf at label 6"}
    if name in faults:
        with pytest.raises(NumericsError, match=faults[name]):
            of_logits(problem, tile_columns)
        return
    found = of_logits(problem, tile_columns)
    expected = twin_of_logits(problem)
    assert_close(found.terms_4T, expected.terms_4T, **EXACT)
    assert_close(found.hidden_grad_TH, expected.hidden_grad_TH, **EXACT)


@names
@tiles
def test_a_token_that_only_the_student_rules_out(name: str, tile_columns: int) -> None:
    problem = barred(True, False, name)
    if name == "forward_kl":
        with pytest.raises(NumericsError, match=r"token row 0 of 2: .* divergence inf at label 3"):
            of_logits(problem, tile_columns)
        return
    found = of_logits(problem, tile_columns)
    expected = twin_of_logits(problem)
    assert_close(found.terms_4T, expected.terms_4T, **EXACT)
    assert_close(found.hidden_grad_TH, expected.hidden_grad_TH, **EXACT)
    assert found.hidden_grad_TH[:, BARRED].eq(0).all()


@tiles
@pytest.mark.parametrize("student", [True, False])
def test_the_sampled_token_must_be_possible(tile_columns: int, student: bool) -> None:
    problem = replace(barred(student, not student, "sampled_token"), labels_T=torch.tensor([3, BARRED[0]]))
    with pytest.raises(NumericsError, match="token row 1 of 2"):
        of_logits(problem, tile_columns)


@names
def test_a_row_that_only_one_side_can_produce_is_named_among_many(name: str) -> None:
    """Row 7 alone is at fault, and its teacher is not the first to be worked on."""
    problem = make_problem(gated=9, divergence=DIVERGENCES[name])
    logits_TV, teacher_GV = problem.hidden_TH @ problem.weight_VH.T, problem.teacher_GH @ problem.weight_VH.T
    at = int((problem.rows_G == 7).nonzero()) if 7 in problem.rows_G else 8
    rows_G = problem.rows_G.clone()
    rows_G[at] = 7
    if name == "forward_kl":
        logits_TV[7, 2] = -INF
    elif name == "sampled_token":
        teacher_GV[at, problem.labels_T[7]] = -INF
    else:
        teacher_GV[at, int(logits_TV[7, : problem.valid].argmax())] = -INF
    given = logits_problem(logits_TV, teacher_GV, problem.labels_T, divergence=problem.divergence)
    given = replace(given, rows_G=rows_G, valid=problem.valid)
    if "jsd" in name or name == "top3_forward_kl":
        assert of_logits(given, 5).terms_4T.isfinite()[:3].all()
    else:
        with pytest.raises(NumericsError, match="token row 7 of 11"):
            of_logits(given, 5)


@pytest.mark.parametrize("student", [True, False])
def test_a_row_of_nothing_but_minus_infinity_is_an_error(student: bool) -> None:
    problem = barred(False, False, "jsd")
    (problem.hidden_TH if student else problem.teacher_GH)[1] = -INF
    with pytest.raises(NumericsError, match="token row 1 of 2"):
        of_logits(problem, 2)


# --- hidden rows: an infinite logit is a broken weight there


@pytest.mark.parametrize("way", HIDDEN_WAYS)
@names
@pytest.mark.parametrize("value", [-INF, INF, torch.nan])
def test_a_broken_weight_is_an_error(way: str, name: str, value: float) -> None:
    problem = make_problem(divergence=DIVERGENCES[name])
    positive = replace(problem, hidden_TH=problem.hidden_TH.abs(), teacher_GH=problem.teacher_GH.abs())
    positive.weight_VH[13] = value
    with pytest.raises(NumericsError, match="token row 0 of 11"):
        package(way, positive)
    vocab = VocabShard(0, problem.valid, None)
    with pytest.raises(NumericsError, match="token row 0 of 11"):
        head_logprobs(positive.hidden_TH, positive.weight_VH, problem.labels_T, vocab=vocab)


@pytest.mark.parametrize("way", HIDDEN_WAYS)
@names
@pytest.mark.parametrize("value", [INF, torch.nan])
def test_a_broken_weight_of_the_teachers_own_is_an_error(way: str, name: str, value: float) -> None:
    problem = make_problem(teacher_hidden=4, divergence=DIVERGENCES[name])
    positive = replace(problem, teacher_GH=problem.teacher_GH.abs())
    assert positive.teacher_weight_VH is not None
    positive.teacher_weight_VH[13] = value
    with pytest.raises(NumericsError, match=f"token row {int(problem.rows_G.min())} of 11"):
        package(way, positive)


@ways
@names
@pytest.mark.parametrize("fault", ["student", "teacher", "label below", "label of padding", "label beyond"])
def test_what_is_not_finite_is_named(way: str, name: str, fault: str) -> None:
    problem = make_problem(divergence=DIVERGENCES[name])
    row = int(problem.rows_G[3])
    match fault:
        case "student":
            problem.hidden_TH[row, 2] = torch.nan
        case "teacher":
            problem.teacher_GH[3, 2] = torch.nan
        case "label below":
            problem.labels_T[row] = -1
        case "label of padding":
            problem.labels_T[row] = problem.valid
        case _:
            problem.labels_T[row] = 1000
    with pytest.raises(NumericsError, match=rf"token row {row} of 11: found log-prob .* Fix: look for"):
        package(way, problem)


@pytest.mark.parametrize("fault", ["hidden", "label"])
def test_logprobs_alone_name_what_is_not_finite(fault: str) -> None:
    problem = make_problem()
    if fault == "hidden":
        problem.hidden_TH[5, 2] = torch.nan
    else:
        problem.labels_T[5] = problem.valid
    vocab = VocabShard(0, problem.valid, None)
    with pytest.raises(NumericsError, match="token row 5 of 11"):
        head_logprobs(problem.hidden_TH, problem.weight_VH, problem.labels_T, vocab=vocab)


def test_logits_beyond_float32_are_an_error() -> None:
    """A sum of finite products that overflows is no better than an infinite weight."""
    problem = make_problem().to(torch.float32)
    big: Tensor = problem.weight_VH.sign() * 3e38
    with pytest.raises(NumericsError, match="token row 0 of 11"):
        package("terms", replace(problem, weight_VH=big))
