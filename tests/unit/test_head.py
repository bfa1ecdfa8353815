"""The head on one rank against its dense float64 twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.errors import NumericsError
from sdpg_megatron.head import HeadTerms, TeacherRows, VocabShard, head_logprobs, head_terms
from tests.head_twin import Problem, dense_gradients, dense_terms, make_problem

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SINGLE = {"rtol": 2e-5, "atol": 2e-5}


def run(problem: Problem, **options: Any) -> HeadTerms:
    return head_terms(
        problem.hidden_TH,
        problem.weight_VH,
        problem.labels_T,
        vocab=VocabShard(0, problem.valid, None),
        teacher=TeacherRows(problem.teacher_GH, problem.rows_G),
        **{"chunk_rows": 4, **options},
    )


def values(terms: HeadTerms) -> list[Tensor]:
    assert terms.divergence_T is not None
    return [terms.logprob_T, terms.entropy_T, terms.divergence_T]


def gradients(problem: Problem, weights_3: list[float], **options: Any) -> tuple[Tensor, Tensor]:
    leaf = replace(
        problem,
        hidden_TH=problem.hidden_TH.clone().requires_grad_(),
        weight_VH=problem.weight_VH.clone().requires_grad_(),
    )
    # A term of weight 0 stays out of the graph, so that nothing comes back for it.
    parts = [
        weight * (grad_T * term_T).sum()
        for weight, grad_T, term_T in zip(weights_3, leaf.upstream_3T, values(run(leaf, **options)), strict=True)
        if weight
    ]
    return torch.autograd.grad(torch.stack(parts).sum(), (leaf.hidden_TH, leaf.weight_VH))


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 256])
@pytest.mark.parametrize("temperatures", [{}, {"temperature": 0.6}, {"temperature": 0.6, "teacher_temperature": 1.5}])
def test_values_equal_the_dense_twin(chunk_rows: int, temperatures: dict[str, float]) -> None:
    problem = make_problem()
    for found, expected in zip(
        values(run(problem, chunk_rows=chunk_rows, **temperatures)), dense_terms(problem, **temperatures), strict=True
    ):
        assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("weights_3", [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.7, -0.3, 1.9]])
@pytest.mark.parametrize("temperatures", [{}, {"temperature": 0.6}, {"temperature": 0.6, "teacher_temperature": 1.5}])
def test_gradients_equal_the_dense_twin(weights_3: list[float], temperatures: dict[str, float]) -> None:
    problem = make_problem()
    found = gradients(problem, weights_3, **temperatures)
    expected = dense_gradients(problem, weights_3, **temperatures)
    assert_close(found[0], expected[0], **EXACT)
    assert_close(found[1], expected[1], **EXACT)


def test_gradcheck() -> None:
    problem = make_problem(rows=4, columns=7, valid=6, hidden=3, gated=2)
    labels_T, vocab = problem.labels_T, VocabShard(0, 6, None)

    # The divergence is left out: its gradient in the matrix excludes the teacher's use of it.
    def terms(hidden_TH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        out = head_terms(hidden_TH, weight_VH, labels_T, vocab=vocab, temperature=0.7, chunk_rows=3)
        return out.logprob_T, out.entropy_T

    def divergence(hidden_TH: Tensor) -> Tensor:
        return values(run(replace(problem, hidden_TH=hidden_TH), temperature=0.7))[2]

    hidden_TH = problem.hidden_TH.clone().requires_grad_()
    assert torch.autograd.gradcheck(terms, (hidden_TH, problem.weight_VH.clone().requires_grad_()))
    assert torch.autograd.gradcheck(divergence, (hidden_TH,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    """Against float64 of the same values. bfloat16 gradients are rounded once, when they are handed back."""
    narrow = make_problem(rows=40, columns=1000, valid=990, hidden=64, gated=30).to(dtype)
    wide = narrow.to(torch.float64)
    for found, expected in zip(values(run(narrow)), dense_terms(wide), strict=True):
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, **SINGLE)
    rounding = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else SINGLE
    for found, expected in zip(gradients(narrow, [1.0, 0.5, 1.0]), dense_gradients(wide, [1.0, 0.5, 1.0]), strict=True):
        assert found.dtype == dtype
        assert_close(found.double(), expected, **rounding)


@pytest.mark.parametrize("padding", [0.0, 1e4, torch.nan])
def test_padding_never_counts(padding: float) -> None:
    problem = make_problem()
    problem.weight_VH[problem.valid :] = padding
    for found, expected in zip(values(run(problem)), dense_terms(problem), strict=True):
        assert_close(found, expected, **EXACT)
    _, weight_grad_VH = gradients(problem, [1.0, 1.0, 1.0])
    assert weight_grad_VH[problem.valid :].eq(0).all()
    assert_close(weight_grad_VH, dense_gradients(make_problem(), [1.0, 1.0, 1.0])[1], **EXACT)


def logits_problem(student_TV: Tensor, teacher_TV: Tensor, labels_T: Tensor) -> Problem:
    """A problem with the given logits: the matrix is the identity."""
    rows, columns = student_TV.shape
    upstream_3T = torch.ones(3, rows, dtype=student_TV.dtype)
    eye_VH = torch.eye(columns, dtype=student_TV.dtype)
    return Problem(student_TV, eye_VH, labels_T, teacher_TV, torch.arange(rows), columns, upstream_3T)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_extreme_logits_in_float32(offset: float) -> None:
    """Gaps of 1e4 and common offsets of 1e4; all inputs are exact in float32."""
    student_TV = torch.tensor([[1e4, -1e4, 0.0, 1.0], [3.0, 2.0, 1.0, 0.5], [0.0, -1e4, -1e4, -1e4]]) + offset
    teacher_TV = torch.tensor([[2.0, 1e4, 0.0, 1.0], [1.0, 1e4, 0.0, -4.0], [0.0, -1e4, -1e4, -1e4]]) - offset
    problem = logits_problem(student_TV, teacher_TV, torch.tensor([1, 2, 0]))
    for found, expected in zip(values(run(problem)), dense_terms(problem), strict=True):
        assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for found, expected in zip(
        gradients(problem, [1.0, 1.0, 1.0]), dense_gradients(problem, [1.0, 1.0, 1.0]), strict=True
    ):
        assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_same_distribution_has_no_divergence() -> None:
    problem = make_problem(gated=11).to(torch.float32)
    same = replace(problem, teacher_GH=problem.hidden_TH[problem.rows_G])
    divergence_T = values(run(same))[2]
    assert divergence_T.abs().max() <= 1e-6
    for gradient in gradients(same, [0, 0, 1.0]):
        assert gradient.abs().max() <= 1e-5


def test_divergence_is_not_negative_near_zero() -> None:
    problem = make_problem(rows=200, columns=4000, valid=4000, hidden=32, gated=200).to(torch.float32)
    noise_GH = 1e-4 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    near = replace(problem, teacher_GH=problem.hidden_TH[problem.rows_G] + noise_GH)
    assert values(run(near))[2].min() >= -1e-6


def infinite_problem(student_T: Tensor) -> Problem:
    """Two hidden columns read one logit each of an infinite token: (h_0 > 0) gives it -inf."""
    weight_VH = torch.tensor([[1.0, 0.5], [0.3, 1.0], [-torch.inf, 0.0]], dtype=torch.float64)
    teacher_TH = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    labels_T = torch.tensor([0, 1])
    return Problem(student_T, weight_VH, labels_T, teacher_TH, torch.arange(2), 3, torch.ones(3, 2).double())


def test_a_token_that_neither_can_produce_contributes_nothing() -> None:
    problem = infinite_problem(torch.tensor([[1.0, 1.0], [0.5, 2.0]], dtype=torch.float64))
    finite = replace(problem, weight_VH=problem.weight_VH[:2], valid=2)
    for found, expected in zip(values(run(problem)), dense_terms(finite), strict=True):
        assert_close(found, expected, **EXACT)
    _, weight_grad_VH = gradients(problem, [1.0, 1.0, 1.0])
    assert_close(weight_grad_VH[:2], dense_gradients(finite, [1.0, 1.0, 1.0])[1], **EXACT)
    assert weight_grad_VH[2].eq(0).all()


def test_a_token_that_only_the_teacher_rules_out_is_an_error() -> None:
    problem = make_problem(gated=1)
    problem.rows_G[0] = 7
    weight_VH = problem.weight_VH.abs()
    teacher_GH = torch.full_like(problem.teacher_GH, -1e200)
    weight_VH[3] = 1e200  # the teacher's logit overflows to -inf, the student's is merely large
    hidden_TH = problem.hidden_TH.abs() * 1e-200
    broken = replace(problem, weight_VH=weight_VH, teacher_GH=teacher_GH, hidden_TH=hidden_TH)
    with pytest.raises(NumericsError, match=r"token row 7 of 11: .* divergence inf"):
        run(broken)


@pytest.mark.parametrize("call", ["head_terms", "head_logprobs"])
@pytest.mark.parametrize("fault", ["hidden", "label", "padding label"])
def test_what_is_not_finite_is_named(call: str, fault: str) -> None:
    problem = make_problem()
    if fault == "hidden":
        problem.hidden_TH[5, 2] = torch.nan
    else:
        problem.labels_T[5] = -1 if fault == "label" else problem.valid
    function = {"head_terms": head_terms, "head_logprobs": head_logprobs}[call]
    with pytest.raises(NumericsError, match="token row 5 of 11"):
        function(problem.hidden_TH, problem.weight_VH, problem.labels_T, vocab=VocabShard(0, problem.valid, None))


def test_no_rows_give_connected_zero_gradients() -> None:
    problem = make_problem(rows=0, gated=0)
    leaf = replace(problem, hidden_TH=problem.hidden_TH.requires_grad_(), weight_VH=problem.weight_VH.requires_grad_())
    total = torch.stack([term_T.sum() for term_T in values(run(leaf))]).sum()
    total.backward()
    assert leaf.hidden_TH.grad is not None and leaf.hidden_TH.grad.shape == (0, 6)
    assert leaf.weight_VH.grad is not None and leaf.weight_VH.grad.eq(0).all()


def test_only_wanted_gradients_are_made() -> None:
    problem = make_problem()
    frozen = replace(problem, hidden_TH=problem.hidden_TH.clone().requires_grad_())
    run(frozen).logprob_T.sum().backward()
    expected, _ = dense_gradients(replace(problem, upstream_3T=torch.ones(3, 11)), [1.0, 0.0, 0.0])
    assert_close(frozen.hidden_TH.grad, expected, **EXACT)


def test_logprobs_alone_are_the_same_bits_without_a_graph() -> None:
    problem = make_problem().to(torch.float32)
    weight_VH = problem.weight_VH.requires_grad_()
    vocab = VocabShard(0, problem.valid, None)
    alone_T = head_logprobs(problem.hidden_TH, weight_VH, problem.labels_T, vocab=vocab, temperature=0.7)
    terms = head_terms(problem.hidden_TH, weight_VH, problem.labels_T, vocab=vocab, temperature=0.7)
    assert torch.equal(alone_T, terms.logprob_T)
    assert not alone_T.requires_grad
    assert terms.divergence_T is None


def test_inputs_come_back_unmodified() -> None:
    problem = make_problem()
    before = make_problem()
    gradients(problem, [1.0, 1.0, 1.0])
    for name in ("hidden_TH", "weight_VH", "labels_T", "teacher_GH", "rows_G"):
        assert torch.equal(getattr(problem, name), getattr(before, name)), name
