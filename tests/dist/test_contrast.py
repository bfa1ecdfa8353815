"""The divergence under the right hint less that under a wrong one, against dense float64 twins from the formula.

Shapes: T rows (response tokens), G those that the teacher reads, V columns, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing import assert_close

from sdpg_megatron.records import MicroBatch, SequenceBatch
from tests.dist.test_methods import (
    ALL,
    COLUMNS,
    CONTEXT,
    HIDDEN,
    RIGHT,
    ROWS,
    TEMPERATURE,
    TOTAL,
    VALID,
    Question,
    config_of,
    jsd,
    kl,
    make_question,
    top_and_tail,
)
from tests.pool import RankPool

RAMPS = {"beta_warmup_steps": 0, "beta_decay_steps": 0}
BOUND = 0.3
Divergence = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Case:
    """An objective; its divergence and weights, what it has beside, and the responses that the teacher reads."""

    objective: dict[str, Any]
    divergence: Divergence
    contrast: float
    beta: float = 1.0
    alpha: float = 0.0
    outcome: bool = False
    weighted: bool = False
    bound: float = float("inf")
    gates: tuple[float, ...] = ALL


def sampled(logp: Tensor, logq: Tensor) -> Tensor:
    """log p - log q, with the gradient (log p - log q) d log p."""
    gap = (logp - logq).detach()
    return gap + gap * (logp - logp.detach())


CASES = {
    "sdpg": Case(
        {"name": "sdpg", "policy": "reinforce", "alpha": 0.3, "beta": 0.7, "contrast": 0.6, **RAMPS},
        lambda p_V, q_V, y: kl(p_V, q_V),
        *(0.6, 0.7, 0.3, True, True),
        gates=RIGHT,
    ),
    "opsd": Case({"name": "opsd", "contrast": 1.0}, lambda p_V, q_V, y: jsd(p_V, q_V), 1.0),
    "opcd_top": Case(
        {"name": "opcd", "top_k": 3, "contrast": 0.25},
        lambda p_V, q_V, y: kl(*top_and_tail(p_V, q_V, 3)),
        0.25,
        gates=RIGHT,
    ),
    "sampled_token": Case(
        {"name": "opcd", "divergence": "sampled_token", "contrast": 0.5},
        lambda p_V, q_V, y: sampled(p_V[y].log(), q_V[y].log()),
        0.5,
    ),
    "clipped": Case(
        {"name": "opcd", "divergence_clip": BOUND, "contrast": 0.5},
        lambda p_V, q_V, y: kl(p_V, q_V),
        0.5,
        bound=BOUND,
    ),
}


def wrong_TH(question: Question) -> Tensor:
    """Hidden rows of the teacher with the wrong hint."""
    generator = torch.Generator().manual_seed(12)
    return question.teacher_TH + torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)


# --- the twin


def twin(case: Case) -> tuple[Tensor, ...]:
    """Mixed loss, its gradients in hidden rows and matrix, and the mean divergence under the wrong hint."""
    q = make_question(list(case.gates))
    hidden_TH, weight_VH = (x.clone().requires_grad_() for x in (q.hidden_TH, q.weight_VH))
    p_TV = (hidden_TH @ weight_VH[:VALID].T / TEMPERATURE).softmax(-1)
    right_TV, wrong_TV = (
        (teacher_TH @ q.weight_VH[:VALID].T / TEMPERATURE).softmax(-1) for teacher_TH in (q.teacher_TH, wrong_TH(q))
    )
    losses, found = [], []
    for t, (p_V, y) in enumerate(zip(p_TV, q.labels_T.tolist(), strict=True)):
        right, wrong = (case.divergence(p_V, teacher_V[t], y) for teacher_V in (right_TV, wrong_TV))
        if q.gate_T[t]:
            found.append(float(wrong.detach()))
        right, wrong = (x * min(1.0, case.bound / abs(float(x.detach()))) for x in (right, wrong))
        logp = p_V[y].log()
        rho = float((logp.detach() - q.old_logprob_T[t]).exp()) if case.weighted else 1.0
        loss = rho * case.beta * q.gate_T[t] * (right - case.contrast * wrong)
        if case.outcome:
            loss = loss - q.advantage_T[t] * logp
        losses.append(loss + rho * case.alpha * (logp - q.reference_logprob_T[t]) ** 2 / 2)
    mixed = (q.mixture_T * torch.stack(losses)).sum()
    gradients = torch.autograd.grad(mixed, (hidden_TH, weight_VH))
    return mixed.detach(), *gradients, torch.tensor(found).mean()


# --- the package


class LastStage(nn.Module):
    """As much of a model as the loss reads: an output matrix's shard."""

    post_process = True

    def __init__(self, weight_VH: Tensor) -> None:
        super().__init__()
        self.output_layer: Any = nn.Module()
        self.output_layer.weight = nn.Parameter(weight_VH.clone())
        self.output_layer.sequence_parallel = False


def batch_of(question: Question, wrong_TH: Tensor | None) -> MicroBatch:
    """The question as one sequence of hidden rows."""
    rows_G = question.gate_T.nonzero()[:, 0]
    nothing = SequenceBatch(torch.zeros(1, ROWS, dtype=torch.int64), torch.arange(ROWS))
    return MicroBatch(
        student=nothing,
        teacher=nothing,
        gated_rows_G=rows_G,
        labels_T=question.labels_T,
        sequence_T=torch.zeros(ROWS, dtype=torch.int64),
        advantages_T=question.advantage_T,
        gates_T=question.gate_T,
        weights_T=question.mixture_T,
        rollout_logprobs_T=question.old_logprob_T,
        old_logprobs_T=question.old_logprob_T,
        reference_logprobs_T=question.reference_logprob_T,
        teacher_hidden_GH=question.teacher_TH[rows_G],
        contrast_hidden_GH=None if wrong_TH is None else wrong_TH[rows_G],
    )


def package(
    objective: dict[str, Any], gates: tuple[float, ...], schedule: str, *, negative_context: str = "wrong"
) -> tuple[Tensor, ...]:
    """The twin's answer on this rank's shard. `misled`: what the second teacher reads, if "none" nothing."""
    from sdpg_megatron.mcore.forward_step import ForwardStep
    from sdpg_megatron.mcore.head import Head, head_options
    from sdpg_megatron.objectives import build

    question, config = make_question(list(gates)), config_of(objective)
    hints = {"none": None, "wrong": wrong_TH(question), "right": question.teacher_TH}
    columns, rank = COLUMNS // dist.get_world_size(), dist.get_rank()
    model = LastStage(question.weight_VH[rank * columns : (rank + 1) * columns])
    hidden_TH = question.hidden_TH.clone().requires_grad_()
    options = replace(head_options(config), chunk_rows=5, tile_columns=7, schedule=schedule)  # type: ignore[arg-type]
    assert dist.group.WORLD is not None
    step = ForwardStep(build(config.objective, TOTAL), CONTEXT, Head(VALID, dist.group.WORLD, options))
    loss_sum, _, report = step.loss(batch_of(question, hints[negative_context]), model, hidden_TH[None])
    gradients = torch.autograd.grad(loss_sum, (hidden_TH, model.output_layer.weight))
    found = report["distill/contrast_kl"].value if "distill/contrast_kl" in report else torch.tensor(0.0)
    return loss_sum.detach(), *gradients, found


def answers(schedule: str) -> dict[str, tuple[Tensor, ...]]:
    return {name: package(case.objective, case.gates, schedule) for name, case in CASES.items()}


@pytest.mark.parametrize("schedule", ["grad_in_forward", "recompute"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_contrast_equals_its_formula(ranks: RankPool, tensor: int, schedule: str) -> None:
    found = ranks.run(answers, tensor, schedule)
    for name, case in CASES.items():
        loss, hidden_grad_TH, weight_grad_VH, contrast = twin(case)
        assert contrast.abs() > 0.1 and hidden_grad_TH.abs().max() > 1e-3

        def message(text: str, name: str = name) -> str:
            return f"{name}: {text}"

        for part in found:
            assert_close(part[name][0], loss, rtol=1e-10, atol=1e-12, msg=message)
            assert_close(part[name][1], hidden_grad_TH, rtol=1e-9, atol=1e-11, msg=message)
            assert_close(part[name][3], contrast.float(), rtol=1e-5, atol=0, msg=message)
        whole_VH = torch.cat([part[name][2] for part in found])
        assert_close(whole_VH, weight_grad_VH, rtol=1e-9, atol=1e-11, msg=message)


@pytest.mark.parametrize("name", ["opcd", "opsd"])
def test_two_hints_that_say_the_same_teach_nothing(ranks: RankPool, name: str) -> None:
    """At contrast 1; at any other some of the distillation is left."""
    ((loss, hidden_grad_TH, weight_grad_VH, _),) = ranks.run(same_hints, 1, {"name": name, "contrast": 1.0})
    assert max(float(x.abs().max()) for x in (loss, hidden_grad_TH, weight_grad_VH)) < 1e-13
    ((_, half_TH, _, _),) = ranks.run(same_hints, 1, {"name": name, "contrast": 0.5})
    ((_, plain_TH, _, _),) = ranks.run(package, 1, {"name": name}, ALL, "grad_in_forward", negative_context="none")
    assert plain_TH.abs().max() > 1e-3
    assert_close(half_TH, plain_TH / 2)


def same_hints(objective: dict[str, Any]) -> tuple[Tensor, ...]:
    return package(objective, ALL, "grad_in_forward", negative_context="right")
