"""The entropy bonus against a dense float64 twin, through the head."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.head import HeadOptions, HeadTerms, VocabShard, head_loss
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.objectives.base import RequiredPasses, StepContext, TokenTerms

ROWS, COLUMNS, HIDDEN, TAU = 9, 21, 6, 0.8
CONTEXT = StepContext(step=1, total_steps=4)


def sample() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(COLUMNS, HIDDEN, generator=generator, dtype=torch.float64)
    labels_T = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    advantage_T = torch.tensor([1.5, 0.0, -0.5], dtype=torch.float64).repeat_interleave(3)
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), labels_T, advantage_T


@pytest.mark.parametrize("schedule", ["grad_in_forward", "recompute"])
def test_value_and_gradient_are_those_of_a_dense_twin(schedule: Literal["grad_in_forward", "recompute"]) -> None:
    hidden_TH, weight_VH, labels_T, advantage_T = sample()
    logp_TV = (hidden_TH @ weight_VH.T / TAU).log_softmax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    dense = (-advantage_T * logp_TV[torch.arange(ROWS), labels_T] - 0.3 * entropy_T).sum()
    expected = torch.autograd.grad(dense, (hidden_TH, weight_VH))

    objective = build_objective(ObjectiveConfig(name="grpo", policy="reinforce", alpha=0.0, entropy_coefficient=0.3), 4)

    def loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
        given = TokenTerms(
            logprob_T=terms.logprob_T,
            divergence_T=None,
            old_logprob_T=terms.logprob_T.detach(),
            reference_logprob_T=None,
            advantage_T=advantage_T[at_C],
            gate_T=torch.zeros_like(terms.logprob_T),
            entropy_T=terms.entropy_T,
        )
        return objective.loss(given, CONTEXT).loss_T

    options = HeadOptions(schedule=schedule, temperature=TAU, chunk_rows=4)
    found, _ = head_loss(hidden_TH, weight_VH, labels_T, loss, vocab=VocabShard(0, COLUMNS, None), options=options)
    assert_close(found, dense)
    for one, other in zip(torch.autograd.grad(found, (hidden_TH, weight_VH)), expected, strict=True):
        assert_close(one, other)


def test_it_needs_every_token_and_no_pass() -> None:
    config = ObjectiveConfig(name="grpo", alpha=0.0, entropy_coefficient=0.1)
    assert build_objective(config, 4).required_passes(CONTEXT) == RequiredPasses(every_token=True)


def test_without_the_entropy_it_says_so() -> None:
    one_T = torch.ones(1)
    terms = TokenTerms(
        logprob_T=-one_T, divergence_T=None, old_logprob_T=-one_T, reference_logprob_T=None, advantage_T=one_T,
        gate_T=one_T,
    )  # fmt: skip
    with pytest.raises(ValueError, match="entropy"):
        build_objective(ObjectiveConfig(name="grpo", alpha=0.0, entropy_coefficient=0.1), 4).loss(terms, CONTEXT)


@pytest.mark.parametrize("gate", [True, False])
def test_the_teacher_reads_what_it_would_read_without_the_bonus(gate: bool) -> None:
    plain, bonus = (build_objective(ObjectiveConfig(gate=gate, entropy_coefficient=c), 4) for c in (0.0, 0.3))
    advantages = (-1.0, 0.0, 1.0)
    found = [bonus.distill_enabled(advantage) for advantage in advantages]
    assert found == [plain.distill_enabled(advantage) for advantage in advantages] == [not gate, not gate, True]
