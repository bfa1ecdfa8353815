"""What each divergence is by itself, apart from the twin: limits, bounds, symmetries and refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.head import (
    Divergence,
    ForwardKL,
    HeadOptions,
    JensenShannon,
    ReverseKL,
    SampledToken,
    TopK,
    VocabShard,
    logits_terms,
)
from tests.head_twin import WAYS, Answer, dense, logits_problem, make_problem, package

OVER = {"reverse_kl": ReverseKL(), "forward_kl": ForwardKL(), "jsd_0.3": JensenShannon(0.3)}
overs = pytest.mark.parametrize("over", OVER.values(), ids=OVER)


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits of 8 rows and 12 columns."""
    student_TV, teacher_TV = 2 * torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(seed)).double()
    return student_TV, teacher_TV


def answer(divergence: Divergence, student_TV: Tensor, teacher_TV: Tensor) -> Answer:
    """By hidden rows that are the logits; the gradient of their rows is that of the logits."""
    labels_T = torch.zeros(len(student_TV), dtype=torch.int64)
    return package("grad_in_forward", logits_problem(student_TV, teacher_TV, labels_T, divergence=divergence).alone(2))


def test_the_reverse_kl_swapped_is_the_forward_kl() -> None:
    student_TV, teacher_TV = pair()
    reverse, forward = answer(ReverseKL(), teacher_TV, student_TV), answer(ForwardKL(), student_TV, teacher_TV)
    assert_close(reverse.terms_4T[2], forward.terms_4T[2], rtol=1e-12, atol=1e-12)


def test_the_forward_kl_pulls_by_p_less_q() -> None:
    student_TV, teacher_TV = pair()
    found = answer(ForwardKL(), student_TV, teacher_TV)
    assert_close(found.hidden_grad_TH, student_TV.softmax(1) - teacher_TV.softmax(1), rtol=1e-12, atol=1e-12)


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    student_TV, teacher_TV = pair()
    for beta in (0.2, 0.5):
        one = answer(JensenShannon(beta), student_TV, teacher_TV).terms_4T[2]
        other = answer(JensenShannon(1 - beta), teacher_TV, student_TV).terms_4T[2]
        assert_close(one, other, rtol=1e-12, atol=1e-12)
        bound = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
        assert one.min() > 0 and one.max() < bound
        apart_TV = torch.eye(2).double() * 50
        assert_close(
            answer(JensenShannon(beta), apart_TV, apart_TV.flip(0)).terms_4T[2], torch.full((2,), bound).double()
        )


@pytest.mark.parametrize(("beta", "share", "limit"), [(1e-6, 1e-6, ForwardKL()), (1 - 1e-6, 1e-6, ReverseKL())])
def test_jensen_shannon_per_share_becomes_a_kl(beta: float, share: float, limit: Divergence) -> None:
    """beta is the teacher's share of the mixture: without it the mixture is the student."""
    student_TV, teacher_TV = pair()
    found, expected = answer(JensenShannon(beta), student_TV, teacher_TV), answer(limit, student_TV, teacher_TV)
    assert_close(found.terms_4T[2] / share, expected.terms_4T[2], rtol=1e-3, atol=1e-6)
    assert_close(found.hidden_grad_TH / share, expected.hidden_grad_TH, rtol=1e-3, atol=1e-4)


@overs
def test_top_k_of_the_whole_vocabulary_is_the_whole_divergence(over: ReverseKL | ForwardKL | JensenShannon) -> None:
    """But for the floor of 1e-7 under a tail that holds no token."""
    student_TV, teacher_TV = pair()
    whole = answer(over, student_TV, teacher_TV)
    for k in (12, 100):
        found = answer(TopK(k, over), student_TV, teacher_TV)
        assert_close(found.terms_4T[2], whole.terms_4T[2], rtol=0, atol=1e-6)
        assert_close(found.hidden_grad_TH, whole.hidden_grad_TH, rtol=0, atol=1e-6)


@overs
def test_telling_more_tokens_apart_never_lessens_a_divergence(over: ReverseKL | ForwardKL | JensenShannon) -> None:
    student_TV, teacher_TV = pair()
    found = torch.stack([answer(TopK(k, over), student_TV, teacher_TV).terms_4T[2] for k in range(1, 12)])
    whole_T = answer(over, student_TV, teacher_TV).terms_4T[2]
    assert (found.diff(dim=0) >= -1e-12).all() and (found.diff(dim=0) > 1e-3).any()
    assert (found <= whole_T + 1e-12).all()


@overs
def test_top_k_pulls_all_tokens_of_the_tail_alike(over: ReverseKL | ForwardKL | JensenShannon) -> None:
    """In proportion to their probability: among them nothing is distilled."""
    student_TV, teacher_TV = pair()
    found = answer(TopK(3, over), student_TV, teacher_TV)
    p_TV = student_TV.softmax(1)
    tail_T9 = p_TV.topk(9, 1, largest=False).indices
    slope_T9 = (found.hidden_grad_TH / p_TV).gather(1, tail_T9)
    assert_close(slope_T9, slope_T9[:, :1].expand_as(slope_T9), rtol=1e-9, atol=1e-12)
    assert slope_T9.abs().min() > 1e-4


@overs
def test_a_tail_too_small_for_float32_counts_as_nothing(over: ReverseKL | ForwardKL | JensenShannon) -> None:
    """Both tails below the floor: what is left is a choice between two tokens."""
    student_TV = torch.tensor([[2.0, 1.0, -40.0, -45.0]]).double()
    teacher_TV = torch.tensor([[0.5, 1.5, -60.0, -30.0]]).double()
    found = answer(TopK(2, over), student_TV, teacher_TV)
    expected = answer(over, student_TV[:, :2], teacher_TV[:, :2])
    assert_close(found.terms_4T[2], expected.terms_4T[2], rtol=1e-6, atol=1e-6)
    assert_close(found.hidden_grad_TH[:, :2], expected.hidden_grad_TH, rtol=1e-6, atol=1e-6)


def rounded() -> tuple[Tensor, Tensor]:
    """Logits with many equal ones among a row's, as bfloat16 has them."""
    generator = torch.Generator().manual_seed(0)
    student_TV, teacher_TV = (2 * torch.randn(6, 40, generator=generator) for _ in range(2))
    return student_TV.round(), teacher_TV


@overs
def test_equal_logits_at_the_kth_place_are_told_apart_alike_whatever_the_tiles(
    over: ReverseKL | ForwardKL | JensenShannon,
) -> None:
    student_TV, teacher_TV = rounded()
    found = []
    for columns in (1, 3, 7, 13, 40):
        options = HeadOptions(divergence=TopK(5, over), tile_columns=columns)
        leaf_TV = student_TV.clone().requires_grad_()
        terms = logits_terms(
            leaf_TV, torch.arange(6), vocab=VocabShard(0, 40, None), teacher_GV=teacher_TV, options=options
        )
        assert terms.divergence_T is not None
        found.append((terms.divergence_T.detach(), torch.autograd.grad(terms.divergence_T.sum(), leaf_TV)[0]))
    for divergence_T, gradient_TV in found[1:]:
        assert_close(divergence_T, found[0][0], rtol=1e-5, atol=1e-6)
        assert_close(gradient_TV, found[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_sampled_tokens_gradient_is_the_kls_in_expectation(way: str) -> None:
    """Averaged over all labels by their probability; that of the value itself would average to 0."""
    whole = make_problem(rows=1, gated=1, columns=9, valid=9)
    p_V = (whole.hidden_TH[0] @ whole.weight_VH.T).softmax(0)
    labels_V = torch.arange(9)
    sampled = replace(
        make_problem(rows=9, gated=9, columns=9, valid=9),
        hidden_TH=whole.hidden_TH.expand(9, -1),
        weight_VH=whole.weight_VH,
        teacher_GH=whole.teacher_GH.expand(9, -1),
        labels_T=labels_V,
        rows_G=labels_V,
    )
    upstream_3T = torch.stack((torch.zeros(9), torch.zeros(9), p_V))
    found = package(way, replace(sampled, divergence=SampledToken(), upstream_3T=upstream_3T))
    expected = dense(replace(whole, divergence=ReverseKL(), upstream_3T=torch.tensor([[0.0], [0.0], [1.0]]).double()))
    assert_close(found.loss, expected.loss, rtol=1e-11, atol=1e-11)
    assert_close(found.hidden_grad_TH.sum(0), expected.hidden_grad_TH[0], rtol=1e-11, atol=1e-11)
    assert_close(found.weight_grad_VH, expected.weight_grad_VH, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, math.nan])
def test_a_share_outside_its_range_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta: found {beta}, expected 0 < beta < 1. Fix: use ForwardKL"):
        JensenShannon(beta)


@pytest.mark.parametrize("k", [0, -3])
def test_no_top_tokens_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: found {k}, expected 1 or more"):
        TopK(k)
