"""The host waits for nothing that the head computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdpg_megatron.head import HeadTerms, head_loss
from sdpg_megatron.head import VocabShard as Shard
from tests.head_twin import DIVERGENCES, make_problem, options_of, teacher_of
from tests.waits import Waits


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("group_rows", [0, 4])
def test_the_host_waits_for_nothing(name: str, group_rows: int) -> None:
    problem = make_problem(divergence=DIVERGENCES[name])
    hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
    vocab = Shard(0, problem.valid, None)

    def loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
        assert terms.divergence_T is not None
        return terms.logprob_T * problem.upstream_3T[0, at_C] + terms.divergence_T + terms.entropy_T

    with Waits() as waits:
        for schedule in ("grad_in_forward", "recompute"):
            total, _ = head_loss(
                hidden_TH,
                weight_VH,
                problem.labels_T,
                loss,
                vocab=vocab,
                teacher=teacher_of(problem, vocab),
                options=options_of(problem, schedule=schedule, group_rows=group_rows, raises=False),
            )
            torch.autograd.grad(total, (hidden_TH, weight_VH))
    assert not waits.found
