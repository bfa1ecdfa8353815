"""The head over tensor-parallel ranks against its dense float64 twin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.errors import NumericsError
from sdpg_megatron.head import HeadTerms, TeacherRows, VocabShard, head_logprobs, head_terms
from tests.head_twin import Problem, dense_gradients, dense_terms, make_problem
from tests.pool import RankPool

UPSTREAM = [0.7, -0.3, 1.9]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@dataclass(frozen=True)
class Answer:
    """What one rank computed."""

    terms_3T: Tensor
    logprob_T: Tensor
    hidden_grad_TH: Tensor
    weight_grad_VH: Tensor


def shard_of(problem: Problem) -> tuple[Tensor, VocabShard]:
    """This rank's rows of the matrix, a leaf of its own."""
    columns = problem.weight_VH.shape[0] // dist.get_world_size()
    start = dist.get_rank() * columns
    weight_VH = problem.weight_VH[start : start + columns].clone().requires_grad_()
    return weight_VH, VocabShard(start, problem.valid, dist.group.WORLD)


def terms_of(problem: Problem, weight_VH: Tensor, vocab: VocabShard, reduce: bool = True) -> HeadTerms:
    return head_terms(
        problem.hidden_TH,
        weight_VH,
        problem.labels_T,
        vocab=vocab,
        temperature=0.6,
        teacher=TeacherRows(problem.teacher_GH, problem.rows_G),
        teacher_temperature=1.5,
        chunk_rows=4,
        reduce_hidden_grad=reduce,
    )


def stack(terms: HeadTerms) -> Tensor:
    assert terms.divergence_T is not None
    return torch.stack((terms.logprob_T, terms.entropy_T, terms.divergence_T))


def weighted(problem: Problem, terms: HeadTerms) -> Tensor:
    scale_31 = torch.tensor(UPSTREAM, dtype=problem.hidden_TH.dtype)[:, None]
    return (scale_31 * problem.upstream_3T * stack(terms)).sum()


def answer(problem: Problem, reduce: bool = True) -> Answer:
    weight_VH, vocab = shard_of(problem)
    leaf = replace(problem, hidden_TH=problem.hidden_TH.clone().requires_grad_())
    terms = terms_of(leaf, weight_VH, vocab, reduce)
    hidden_grad_TH, weight_grad_VH = torch.autograd.grad(weighted(leaf, terms), (leaf.hidden_TH, weight_VH))
    logprob_T = head_logprobs(
        problem.hidden_TH, weight_VH, problem.labels_T, vocab=vocab, temperature=0.6, chunk_rows=4
    )
    return Answer(stack(terms).detach(), logprob_T, hidden_grad_TH, weight_grad_VH)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("valid", [21, 24, 5])
def test_shards_agree_with_the_dense_twin(ranks: RankPool, world_size: int, valid: int) -> None:
    """With 5 valid columns of 24, three of four ranks (or one of two) hold padding alone or nearly so."""
    problem = make_problem(valid=valid)
    problem.weight_VH[valid:] = torch.nan
    answers = ranks.run(answer, world_size, problem)
    expected = torch.stack(dense_terms(problem, 0.6, 1.5))
    hidden_grad_TH, weight_grad_VH = dense_gradients(problem, UPSTREAM, temperature=0.6, teacher_temperature=1.5)
    for found in answers:
        assert_close(found.terms_3T, expected, **EXACT)
        assert_close(found.hidden_grad_TH, hidden_grad_TH, **EXACT)
        assert torch.equal(found.logprob_T, found.terms_3T[0])
    assert_close(torch.cat([found.weight_grad_VH for found in answers]), weight_grad_VH, **EXACT)
    assert all(torch.equal(found.terms_3T, answers[0].terms_3T) for found in answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_same_bits(ranks: RankPool, dtype: torch.dtype) -> None:
    problem = make_problem(rows=33, columns=512, valid=500, hidden=32, gated=20).to(dtype)
    answers = ranks.run(answer, 4, problem)
    expected = torch.stack(dense_terms(problem, 0.6, 1.5))
    assert_close(answers[0].terms_3T.double(), expected, rtol=1e-5, atol=1e-5)
    for found in answers[1:]:
        assert torch.equal(found.terms_3T, answers[0].terms_3T)
        assert torch.equal(found.hidden_grad_TH, answers[0].hidden_grad_TH)


def test_unreduced_hidden_gradient_is_this_shards_part(ranks: RankPool) -> None:
    problem = make_problem()
    parts = [found.hidden_grad_TH for found in ranks.run(answer, 2, problem, reduce=False)]
    whole_TH, _ = dense_gradients(problem, UPSTREAM, temperature=0.6, teacher_temperature=1.5)
    assert_close(parts[0] + parts[1], whole_TH, **EXACT)
    assert not torch.allclose(parts[0], whole_TH)


def test_no_rows_on_several_ranks(ranks: RankPool) -> None:
    for found in ranks.run(answer, 2, make_problem(rows=0, gated=0)):
        assert found.hidden_grad_TH.shape == (0, 6)
        assert found.weight_grad_VH.eq(0).all()


def error_message(problem: Problem) -> str:
    weight_VH, vocab = shard_of(problem)
    with pytest.raises(NumericsError) as caught:
        terms_of(problem, weight_VH, vocab)
    return str(caught.value)


def test_every_rank_raises_alike(ranks: RankPool) -> None:
    problem = make_problem()
    problem.labels_T[9] = problem.valid
    first, second = ranks.run(error_message, 2, problem)
    assert first == second
    assert "token row 9 of 11" in first


def tied_gradient(problem: Problem, tokens_T: Tensor) -> Tensor:
    """Gradient of this rank's shard where the same tensor embeds the input of both students and teachers."""
    weight_VH, vocab = shard_of(problem)
    embedded_VH = _WholeTable.apply(weight_VH)
    student = replace(problem, hidden_TH=embedded_VH[tokens_T].tanh())
    teacher = replace(student, teacher_GH=embedded_VH[tokens_T[problem.rows_G]].sin())
    (weight_grad_VH,) = torch.autograd.grad(weighted(teacher, terms_of(teacher, weight_VH, vocab)), weight_VH)
    return weight_grad_VH


class _WholeTable(torch.autograd.Function):
    """All shards' rows, for an embedding. Every rank computes the same from it, so its gradient is cut, not summed."""

    @staticmethod
    def forward(ctx: object, weight_VH: Tensor) -> Tensor:
        parts = [torch.empty_like(weight_VH) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, weight_VH.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, grad_VH: Tensor) -> Tensor:
        return grad_VH.chunk(dist.get_world_size())[dist.get_rank()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_tied_matrix_gets_nothing_from_the_teacher(ranks: RankPool, world_size: int) -> None:
    problem = make_problem()
    tokens_T = torch.randint(0, problem.valid, (11,), generator=torch.Generator().manual_seed(3))
    found_VH = torch.cat(ranks.run(tied_gradient, world_size, problem, tokens_T))

    weight_VH = problem.weight_VH.clone().requires_grad_()
    dense = replace(
        problem,
        weight_VH=weight_VH,
        hidden_TH=weight_VH[tokens_T].tanh(),
        teacher_GH=weight_VH.detach()[tokens_T[problem.rows_G]].sin(),
    )
    scale_31 = torch.tensor(UPSTREAM, dtype=torch.float64)[:, None]
    loss = (scale_31 * problem.upstream_3T * torch.stack(dense_terms(dense, 0.6, 1.5))).sum()
    assert_close(found_VH, torch.autograd.grad(loss, weight_VH)[0], **EXACT)
