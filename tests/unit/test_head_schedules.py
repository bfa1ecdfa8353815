"""`head_loss`: how often and with what it calls a loss, and what becomes of the gradients until they are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.head import HeadTerms, RowLoss, VocabShard, head_loss, head_terms
from tests.head_twin import WAYS, Problem, ask, dense, dense_terms, make_problem, options_of, package, teacher_of

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SCHEDULES = ("grad_in_forward", "recompute")
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def leaves_of(problem: Problem) -> tuple[Problem, tuple[Tensor, Tensor]]:
    hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
    return replace(problem, hidden_TH=hidden_TH, weight_VH=weight_VH), (hidden_TH, weight_VH)


def loss_of(problem: Problem, loss: RowLoss, schedule: str, *, has_teacher: bool = True) -> tuple[Tensor, HeadTerms]:
    vocab = VocabShard(0, problem.valid, None)
    teacher = teacher_of(problem, vocab) if has_teacher else None
    options = options_of(problem, schedule=schedule)
    return head_loss(
        problem.hidden_TH, problem.weight_VH, problem.labels_T, loss, vocab=vocab, teacher=teacher, options=options
    )


def curved(terms: HeadTerms, at_C: Tensor) -> Tensor:
    """A loss whose gradients depend on the terms, with a hinge and a term that one row in three leaves out."""
    assert terms.divergence_T is not None and terms.teacher_logprob_T is not None
    kept_C = (at_C % 3 > 0).double()
    ratio_C = (terms.logprob_T - terms.teacher_logprob_T / 2).exp().clamp(max=0.4)
    return ratio_C * (1 + at_C) + kept_C * terms.divergence_T**2 - terms.entropy_T * terms.logprob_T.detach()


@schedules
def test_a_curved_loss_has_the_twins_gradients(schedule: str) -> None:
    problem, leaves = leaves_of(make_problem(temperature=0.6))
    loss, terms = loss_of(problem, curved, schedule)
    found = torch.autograd.grad(loss, leaves)
    twin, twins_leaves = leaves_of(make_problem(temperature=0.6))
    expected_terms = dense_terms(twin)
    expected = curved(expected_terms, torch.arange(11)).sum()
    assert_close(loss, expected, **EXACT)
    for one, other in zip(found, torch.autograd.grad(expected, twins_leaves), strict=True):
        assert_close(one, other, **EXACT)
    for name in HeadTerms.__slots__:
        assert_close(getattr(terms, name), getattr(expected_terms, name).detach(), **EXACT)


@schedules
@pytest.mark.parametrize("scale", [1.0, 3.7, -0.25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_scaled_by_what_comes_from_above(schedule: str, scale: float, dtype: torch.dtype) -> None:
    problem, leaves = leaves_of(make_problem().to(dtype))
    _, loss = ask(schedule, problem)
    found = torch.autograd.grad(scale * loss, leaves)
    expected = dense(problem.to(torch.float64))
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]
    for one, other in zip(found, (expected.hidden_grad_TH, expected.weight_grad_VH), strict=True):
        assert one.dtype == dtype
        assert_close(one.double(), scale * other, rtol=tolerance, atol=tolerance)


@schedules
def test_a_loss_may_be_part_of_a_larger_one(schedule: str) -> None:
    """Two of them over the same matrix, beside a term that reads it directly."""
    first, leaves = leaves_of(make_problem())
    other = make_problem(seed=1)
    second = replace(other, weight_VH=first.weight_VH)
    parts = [ask(schedule, part)[1] for part in (first, second)]
    total = parts[0] * parts[1] + first.weight_VH[: first.valid].square().sum()
    found = torch.autograd.grad(total, leaves)
    one, two = dense(first), dense(replace(other, weight_VH=first.weight_VH.detach()))
    assert_close(found[0], one.hidden_grad_TH * two.loss, **EXACT)
    own_VH = 2 * first.weight_VH.detach()
    own_VH[first.valid :] = 0
    assert_close(found[1], one.weight_grad_VH * two.loss + two.weight_grad_VH * one.loss + own_VH, **EXACT)


# --- the calls


@schedules
def test_a_loss_is_called_with_the_rows_it_is_told(schedule: str) -> None:
    problem = make_problem()
    calls: list[tuple[HeadTerms, list[int]]] = []

    def loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
        assert at_C.dtype == torch.int64
        calls.append((terms, at_C.tolist()))
        return terms.logprob_T

    leaf, _ = leaves_of(problem)
    _, whole = loss_of(leaf, loss, schedule)
    rows = [row for _, numbers in calls for row in numbers]
    assert sorted(rows) == list(range(11))
    for terms, numbers in calls:
        for name in HeadTerms.__slots__:
            assert torch.equal(getattr(terms, name).detach(), getattr(whole, name)[numbers]), name
        assert not terms.teacher_logprob_T.requires_grad  # type: ignore[union-attr]
    if schedule == "recompute":
        assert [numbers for _, numbers in calls] == [list(range(11))]
        return
    # 5 rows with a teacher, in the teacher's order, in chunks of 4; and 6 without, in chunks of as many logits.
    has_teacher = problem.rows_G.tolist()
    others = [row for row in range(11) if row not in has_teacher]
    assert [numbers for _, numbers in calls] == [has_teacher[:4], has_teacher[4:], others]


@schedules
def test_without_a_teacher_a_loss_gets_no_divergence(schedule: str) -> None:
    problem, leaves = leaves_of(make_problem())
    calls: list[list[int]] = []

    def loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
        assert terms.divergence_T is None and terms.teacher_logprob_T is None
        calls.append(at_C.tolist())
        return problem.upstream_3T[0, at_C] * terms.logprob_T

    total, terms = loss_of(problem, loss, schedule, has_teacher=False)
    assert terms.divergence_T is None and terms.teacher_logprob_T is None
    assert calls == ([[*range(11)]] if schedule == "recompute" else [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10]])
    expected = dense(problem.alone(0))
    found = torch.autograd.grad(total, leaves)
    assert_close(found[0], expected.hidden_grad_TH, **EXACT)
    assert_close(found[1], expected.weight_grad_VH, **EXACT)


@schedules
def test_a_loss_that_reads_no_term_has_no_gradient(schedule: str) -> None:
    problem, leaves = leaves_of(make_problem())
    total, _ = loss_of(problem, lambda terms, at_C: at_C.double(), schedule)
    assert total == 55
    if schedule == "grad_in_forward":
        assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(total, leaves))
    else:
        assert not total.requires_grad


@schedules
def test_the_terms_come_back_without_a_graph(schedule: str) -> None:
    problem, _ = leaves_of(make_problem())
    _, terms = loss_of(problem, problem.loss, schedule)
    vocab = VocabShard(0, problem.valid, None)
    expected = head_terms(
        problem.hidden_TH,
        problem.weight_VH,
        problem.labels_T,
        vocab=vocab,
        teacher=teacher_of(problem, vocab),
        options=options_of(problem),
    )
    for name in HeadTerms.__slots__:
        assert not getattr(terms, name).requires_grad
        assert torch.equal(getattr(terms, name), getattr(expected, name).detach())


# --- no graph, or twice the same


@schedules
def test_without_a_graph_the_loss_is_the_same(schedule: str) -> None:
    problem, _ = leaves_of(make_problem(temperature=0.6))
    loss, terms = loss_of(problem, curved, schedule)
    with torch.no_grad():
        bare, bare_terms = loss_of(problem, curved, schedule)
    assert not bare.requires_grad
    assert_close(bare, loss.detach(), rtol=1e-14, atol=0)
    for name in HeadTerms.__slots__:
        assert torch.equal(getattr(bare_terms, name), getattr(terms, name))


@schedules
def test_nothing_to_differentiate_is_no_error(schedule: str) -> None:
    problem = make_problem()
    loss, _ = loss_of(problem, problem.loss, schedule)
    assert not loss.requires_grad
    assert_close(loss, dense(problem).loss, **EXACT)


def test_gradients_made_in_the_forward_pass_are_handed_out_once() -> None:
    problem, leaves = leaves_of(make_problem())
    _, loss = ask("grad_in_forward", problem)
    torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"found a second backward pass, .*\. Fix: schedule=recompute"):
        torch.autograd.grad(loss, leaves)


def test_recomputed_gradients_can_be_asked_for_again() -> None:
    problem, leaves = leaves_of(make_problem())
    _, loss = ask("recompute", problem)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("way", ["terms", *SCHEDULES])
def test_gradients_are_constants_themselves(way: str) -> None:
    """Second derivatives are refused, not wrong."""
    problem, leaves = leaves_of(make_problem())
    _, loss = ask(way, problem)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    assert not any(gradient.requires_grad for gradient in gradients)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_question_gets_the_same_bits(way: str) -> None:
    problem = make_problem(rows=40, columns=300, valid=290, hidden=16, gated=20).to(torch.float32)
    one, other = (package(way, problem, chunk_rows=16, tile_columns=64) for _ in range(2))
    assert all(torch.equal(part, other.parts()[name]) for name, part in one.parts().items())
