"""How hard the parts of the loss pull at the logits, against a dense float64 twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.head import Divergence, HeadOptions, TeacherRows, VocabShard, head_gradient_squares
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.objectives.base import StepContext, TokenTerms
from sdpg_megatron.objectives.gradient_balance import gradient_ratio, gradient_squares, term_gradients
from sdpg_megatron.observe.metrics import Metric
from tests.head_twin import DIVERGENCES, dense_divergence

ROWS, COLUMNS, PADDED, HIDDEN, TAU = 11, 19, 24, 5, 0.7
TAUGHT_G = torch.tensor([7, 2, 9, 0])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", DIVERGENCES.values(), ids=DIVERGENCES)
def test_squares_of_each_term(kind: Divergence) -> None:
    hidden_TH, weight_VH, teacher_GH = (normal(n, HIDDEN, seed=n) for n in (ROWS, PADDED, len(TAUGHT_G)))
    labels_T = torch.arange(ROWS) % COLUMNS
    by_logprob_T, by_divergence_T = normal(ROWS, seed=1), normal(ROWS, seed=2)

    logits_TV = (hidden_TH @ weight_VH[:COLUMNS].T).requires_grad_()
    logp_TV = (logits_TV / TAU).log_softmax(-1)
    logq_GV = (teacher_GH @ weight_VH[:COLUMNS].T / TAU).log_softmax(-1)
    logprob_T = logp_TV.gather(1, labels_T[:, None])[:, 0]
    divergence_G = dense_divergence(kind, logp_TV[TAUGHT_G], logq_GV, labels_T[TAUGHT_G][:, None])
    expected = [
        torch.autograd.grad(loss, logits_TV, retain_graph=True)[0].square().sum(-1)
        for loss in ((by_logprob_T * logprob_T).sum(), (by_divergence_T[TAUGHT_G] * divergence_G).sum())
    ]
    found = head_gradient_squares(
        hidden_TH,
        weight_VH,
        labels_T,
        logprob_grad_T=by_logprob_T,
        divergence_grad_T=by_divergence_T,
        vocab=VocabShard(0, COLUMNS, None),
        teacher=TeacherRows(teacher_GH, TAUGHT_G),
        options=HeadOptions(divergence=kind, temperature=TAU, chunk_rows=3, tile_columns=7),
    )
    assert expected[1].count_nonzero() == len(TAUGHT_G)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_a_loss_falls_apart_by_term() -> None:
    """Of -A log p + beta m KL, with weights: -A w in the log-prob, beta m w in the divergence."""
    advantage_T, gate_T = torch.tensor([2.0, -1.0, 0.0, 0.5]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    config = ObjectiveConfig(policy="reinforce", beta=0.25, alpha=0.0, beta_warmup_steps=0, beta_decay_steps=0)
    weights_T = torch.tensor([1.0, 1.0, 2.0, 4.0])
    terms = TokenTerms(
        logprob_T=torch.full((4,), -1.0),
        divergence_T=torch.full((4,), 0.3),
        old_logprob_T=torch.full((4,), -1.0),
        reference_logprob_T=None,
        advantage_T=advantage_T,
        gate_T=gate_T,
    )
    by_logprob_T, by_divergence_T = term_gradients(build_objective(config, 8), terms, StepContext(0, 8), weights_T)
    assert_close(by_logprob_T, -advantage_T * weights_T)
    assert_close(by_divergence_T, 0.25 * gate_T * weights_T)


def test_the_ratio_is_that_of_norms_over_all_tokens() -> None:
    metrics = gradient_squares(torch.tensor([1.0, 3.0]), torch.tensor([9.0, 27.0]))
    merged = {name: Metric(float(metric.values_T.sum()), metric.reduction) for name, metric in metrics.items()}
    assert gradient_ratio(merged)["distill/gradient_ratio"].value == pytest.approx(3.0)
    assert gradient_ratio({}) == {}
    assert gradient_ratio({**merged, "policy/gradient_square": Metric(0.0)}) == {}
