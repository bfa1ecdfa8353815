"""Each method's per-token loss and gradients against a dense float64 twin from its formula, over vocabulary shards.

Shapes: T rows (response tokens), G those with a teacher, V columns, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.objectives.base import StepContext, TokenTerms
from tests.objective_samples import Sample
from tests.pool import RankPool

ROWS, COLUMNS, VALID, HIDDEN = 16, 24, 21, 6
STEP, TOTAL = 20, 40
CONTEXT = StepContext(STEP - 1, TOTAL)
"""The schedules' k is STEP."""
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Question(Sample):
    """Four responses of four tokens, two of them with a positive advantage; old log-probs some ratios of e away."""

    mixture_T: Tensor
    """Weights of the tokens' losses in what is differentiated."""


def make_question(gates: list[float]) -> Question:
    """`gates`: which responses the teacher reads."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden_TH, teacher_TH, weight_VH = normal(ROWS, HIDDEN), normal(ROWS, HIDDEN), normal(COLUMNS, HIDDEN)
    labels_T = torch.randint(0, VALID, (ROWS,), generator=generator)
    logprob_T = (hidden_TH @ weight_VH[:VALID].T / TEMPERATURE).log_softmax(-1)[torch.arange(ROWS), labels_T]
    noise_T = 0.5 * normal(ROWS)
    noise_T[:3] = torch.tensor([-1.0, 1.0, -0.22])  # beyond either clip, and between 1.2 and 1.28
    noise_T[4:7] = torch.tensor([-3.0, -1.0, 1.0])  # beyond the dual clip of 10, and beyond either other one
    return Question(
        hidden_TH,
        teacher_TH,
        weight_VH,
        labels_T,
        old_logprob_T=logprob_T + noise_T,
        reference_logprob_T=logprob_T + 0.5 * normal(ROWS),
        advantage_T=torch.tensor([1.3, -0.4, -0.9, 0.8], dtype=torch.float64).repeat_interleave(4),
        gate_T=torch.tensor(gates, dtype=torch.float64).repeat_interleave(4),
        mixture_T=torch.linspace(-1, 2, ROWS, dtype=torch.float64),
    )


# --- the twin


@dataclass(frozen=True)
class Token:
    """What the formulas speak of: distributions, the sampled token, advantage, gate and old and reference log-prob."""

    p_V: Tensor
    q_V: Tensor
    y: int
    advantage: float
    gate: float
    old: float
    reference: float

    @property
    def rho(self) -> Tensor:
        return self.p_V[self.y] / torch.tensor(self.old, dtype=torch.float64).exp()

    @property
    def weight(self) -> float:
        """rho, where it is not differentiated."""
        return float(self.rho.detach())

    @property
    def r(self) -> Tensor:
        return self.p_V[self.y].log() - self.reference


def clipped(t: Token, low: float, high: float, advantage: float | None = None) -> Tensor:
    a = t.advantage if advantage is None else advantage
    return -torch.minimum(t.rho * a, t.rho.clamp(1 - low, 1 + high) * a)


def dual_clipped(t: Token, low: float, high: float, bound: float, advantage: float | None = None) -> Tensor:
    a = t.advantage if advantage is None else advantage
    loss = clipped(t, low, high, a)
    return torch.minimum(loss, torch.tensor(-bound * a, dtype=torch.float64)) if a < 0 else loss


def kl(p_n: Tensor, q_n: Tensor) -> Tensor:
    return (p_n * (p_n / q_n).log()).sum()


def jsd(p_n: Tensor, q_n: Tensor) -> Tensor:
    m_n = (p_n + q_n) / 2
    return (kl(p_n, m_n) + kl(q_n, m_n)) / 2


def top_and_tail(p_V: Tensor, q_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top_k = p_V.topk(k).indices
    return tuple(torch.cat((x_V[top_k], (1 - x_V[top_k].sum()).view(1))) for x_V in (p_V, q_V))  # type: ignore[return-value]


def grpo(t: Token) -> Tensor:
    return clipped(t, 0.2, 0.2)


def grpo_with_reference(t: Token) -> Tensor:
    """The estimate exp(-r) - 1 + r of DeepSeekMath's eq. 4, but for the constant, not weighted as in its eq. 3."""
    return grpo(t) + 0.04 * ((-t.r).exp() + t.r)


def dapo(t: Token) -> Tensor:
    return clipped(t, 0.2, 0.28)


def rpg(t: Token) -> Tensor:
    return dual_clipped(t, 0.2, 0.28, 10.0) + 0.3 * t.weight * t.r**2 / 2


def rpg_clipped_reinforce(t: Token) -> Tensor:
    """The loss of the clipped ratio, held constant, weighs the log-prob."""
    surrogate = dual_clipped(t, 0.2, 0.28, 10.0).detach()
    return surrogate * t.p_V[t.y].log() + 0.3 * t.weight * t.r**2 / 2


def sdpg(t: Token) -> Tensor:
    beta = 0.7 * (TOTAL - STEP) / 35  # warm-up 5 and decay 35 of 40
    return rpg(t) + beta * t.weight * t.gate * kl(t.p_V, t.q_V)


def rlsd(t: Token, student: float | None = None) -> Tensor:
    """`student`: the probability that divides the teacher's; None for the old policy's."""
    sign, share = (1 if t.advantage > 0 else -1), 0.5 * (1 - STEP / 50)
    scale = (float(t.q_V[t.y]) / (math.exp(t.old) if student is None else student)) ** sign
    weight = (1 - share) + share * min(max(scale, 0.8), 1.2)
    return dual_clipped(t, 0.2, 0.2, 3.0, t.advantage * weight)


def rlsd_current(t: Token) -> Tensor:
    return rlsd(t, float(t.p_V[t.y].detach()))


def opsd(t: Token) -> Tensor:
    return jsd(t.p_V, t.q_V)


def opsd_kl(t: Token) -> Tensor:
    return kl(t.p_V, t.q_V)


def opsd_clipped_ratio(t: Token) -> Tensor:
    """Of right responses; clip 0.2 / 0.2."""
    return t.gate * clipped(t, 0.2, 0.2, max(float(t.q_V[t.y].log()) - t.old, 0.0))


def opcd(t: Token) -> Tensor:
    return kl(t.p_V, t.q_V)


def opcd_top(t: Token) -> Tensor:
    return kl(*top_and_tail(t.p_V, t.q_V, 3))


def sdpo(t: Token) -> Tensor:
    return t.gate * min(t.weight, 2.0) * jsd(*top_and_tail(t.p_V, t.q_V, 4))


@dataclass(frozen=True)
class Case:
    """A formula, the configuration that stands for it, and the responses that have a teacher."""

    formula: Callable[[Token], Tensor]
    objective: dict[str, Any]
    gates: tuple[float, ...]


NONE, ALL, RIGHT, SOME = (0, 0, 0, 0), (1, 1, 1, 1), (1, 0, 0, 1), (0, 1, 1, 0)
CASES = {
    "grpo": Case(grpo, {"name": "grpo"}, NONE),
    "grpo_with_reference": Case(grpo_with_reference, {"name": "grpo", "alpha": 0.04}, NONE),
    "dapo": Case(dapo, {"name": "dapo"}, NONE),
    "rpg": Case(rpg, {"name": "rpg", "alpha": 0.3}, NONE),
    "sdpg": Case(sdpg, {"name": "sdpg", "alpha": 0.3, "beta": 0.7}, RIGHT),
    "rpg_clipped_reinforce": Case(
        rpg_clipped_reinforce, {"name": "rpg", "alpha": 0.3, "policy": "clipped_reinforce"}, NONE
    ),
    "rlsd": Case(rlsd, {"name": "rlsd"}, ALL),
    "rlsd_current": Case(rlsd_current, {"name": "rlsd", "credit_ratio": "current"}, ALL),
    "opsd": Case(opsd, {"name": "opsd"}, ALL),
    "opsd_kl": Case(opsd_kl, {"name": "opsd", "divergence": "reverse_kl"}, ALL),
    "opsd_clipped_ratio": Case(
        opsd_clipped_ratio, {"name": "opsd", "distill_loss": "clipped_ratio", "gate": True, "clip_high": 0.2}, RIGHT
    ),
    "opcd": Case(opcd, {"name": "opcd"}, ALL),
    "opcd_top": Case(opcd_top, {"name": "opcd", "top_k": 3}, ALL),
    "sdpo": Case(sdpo, {"name": "sdpo", "top_k": 4}, SOME),
}


def twin(case: Case) -> tuple[Tensor, ...]:
    """Losses [T] and the gradients of their mixture in hidden rows and matrix."""
    q = make_question(list(case.gates))
    hidden_TH, weight_VH = (x.clone().requires_grad_() for x in (q.hidden_TH, q.weight_VH))
    p_TV = (hidden_TH @ weight_VH[:VALID].T / TEMPERATURE).softmax(-1)
    q_TV = (q.teacher_TH @ q.weight_VH[:VALID].T / TEMPERATURE).softmax(-1)
    numbers = (q.labels_T, q.advantage_T, q.gate_T, q.old_logprob_T, q.reference_logprob_T)
    tokens = zip(p_TV, q_TV, *(x.tolist() for x in numbers), strict=True)
    loss_T = torch.stack([case.formula(Token(*token)) for token in tokens])
    return loss_T.detach(), *torch.autograd.grad((q.mixture_T * loss_T).sum(), (hidden_TH, weight_VH))


# --- the package


def config_of(objective: dict[str, Any]) -> RunConfig:
    return parse(
        {
            "run_dir": "unused",
            "steps": TOTAL,
            "model": {"path": "unused"},
            "data": {"train": []},
            "rollout": {"temperature": TEMPERATURE},
            "objective": objective,
        }
    )


def package(case: Case, schedule: str) -> tuple[Tensor, Tensor, Tensor]:
    """The twin's answer on this rank's shard."""
    from sdpg_megatron.head import HeadTerms, TeacherRows, VocabShard, head_loss
    from sdpg_megatron.mcore.head import head_options
    from sdpg_megatron.objectives import build_objective

    question, config = make_question(list(case.gates)), config_of(case.objective)
    objective = build_objective(config.objective, TOTAL)
    columns, rank = COLUMNS // dist.get_world_size(), dist.get_rank()
    hidden_TH = question.hidden_TH.clone().requires_grad_()
    weight_VH = question.weight_VH[rank * columns : (rank + 1) * columns].clone().requires_grad_()
    rows_G = question.gate_T.nonzero()[:, 0]
    required_passes = objective.required_passes(CONTEXT)

    def loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
        return objective.loss(
            TokenTerms(
                logprob_T=terms.logprob_T,
                divergence_T=terms.divergence_T,
                teacher_logprob_T=terms.teacher_logprob_T,
                old_logprob_T=question.old_logprob_T[at_C],
                reference_logprob_T=question.reference_logprob_T[at_C] if required_passes.reference else None,
                advantage_T=question.advantage_T[at_C] * required_passes.policy_loss,
                gate_T=question.gate_T[at_C],
            ),
            CONTEXT,
        ).loss_T

    loss_sum, terms = head_loss(
        hidden_TH,
        weight_VH,
        question.labels_T,
        lambda terms, at_C: question.mixture_T[at_C] * loss(terms, at_C),
        vocab=VocabShard(rank * columns, VALID, dist.group.WORLD),
        teacher=TeacherRows(question.teacher_TH[rows_G], rows_G) if required_passes.privileged else None,
        options=replace(head_options(config), chunk_rows=5, tile_columns=7, schedule=schedule),  # type: ignore[arg-type]
    )
    gradients = torch.autograd.grad(loss_sum, (hidden_TH, weight_VH))
    return loss(terms, torch.arange(ROWS)), *gradients


def answers(schedule: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {name: package(case, schedule) for name, case in CASES.items()}


@pytest.mark.parametrize("schedule", ["grad_in_forward", "recompute"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_methods_equal_their_formulas(ranks: RankPool, tensor: int, schedule: str) -> None:
    found = ranks.run(answers, tensor, schedule)
    for name, case in CASES.items():
        loss_T, hidden_grad_TH, weight_grad_VH = twin(case)
        assert loss_T.abs().max() > 1e-3 and hidden_grad_TH.abs().max() > 1e-3
        for part in found:
            assert_close(part[name][0], loss_T, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            assert_close(part[name][1], hidden_grad_TH, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        whole_VH = torch.cat([part[name][2] for part in found])
        assert_close(whole_VH, weight_grad_VH, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
