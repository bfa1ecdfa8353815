"""Whose weights read the privileged context: each choice over three steps with two mini-batches, against a plain loop.

The plain loop has two of Hugging Face's models, student and teacher, and copies weights from one to the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.records import Prompt
from tests.dist.test_step import config_of, scored_groups
from tests.pool import RankPool
from tests.tiny import write_tiny_model

STEPS, MINIBATCHES = 3, 2
DISTILL = {
    "objective.name": "opcd",
    "optimizer.minibatches": MINIBATCHES,
    "optimizer.lr": 0.05,
    "optimizer.weight_decay": 0.0,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "current": {"objective.teacher": "current"},
    "rollout": {"objective.teacher": "rollout"},
    "every": {"objective.teacher": "every", "objective.teacher_every": 2},
    "every_step": {"objective.teacher": "every", "objective.teacher_every": 1},
    "initial": {"objective.teacher": "initial"},
    "ema": {"objective.teacher": "ema", "objective.teacher_ema": 0.3},
}
PERIODS = {"rollout": 1, "every_step": 1, "every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True, seed=3, layers=2)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("untied"), "qwen3", tied=False, seed=3, layers=2)


@dataclass
class Run:
    """A learner and the mini-batches of every rollout step, all of them of the same four groups."""

    policy_trainer: Any
    ranks: Any
    config: Any

    def minibatches(self) -> list[Any]:
        from sdpg_megatron.batching.collate import PackingLayout
        from sdpg_megatron.batching.micro_batches import Limit
        from sdpg_megatron.batching.samples import make_samples
        from sdpg_megatron.batching.step_batch import build_step

        groups = scored_groups(self.policy_trainer.arch.vocab_size)
        return [
            build_step(
                make_samples(
                    part,
                    self.config.objective,
                    distill_enabled=self.policy_trainer.objective.distill_enabled,
                    outcome=False,
                ),
                regularized=False,
                limit=Limit.of(self.config),
                layout=PackingLayout.of(self.config, self.ranks),
                device=self.policy_trainer.device,
            ).micro_batches
            for part in (groups[:2], groups[2:])
        ]

    def step(self, number: int) -> list[float]:
        """One rollout step as the trainer makes it; the divergence of each of its mini-batches."""
        from sdpg_megatron.objectives.base import StepContext

        self.policy_trainer.begin(number)
        prepared = [self.policy_trainer.with_early_teacher(batches) for batches in self.minibatches()]
        contexts = [StepContext(number * MINIBATCHES + i, STEPS * MINIBATCHES) for i in range(MINIBATCHES)]
        found = [self.policy_trainer.update(b, c) for b, c in zip(prepared, contexts, strict=True)]
        return [metrics["distill/kl"].value for metrics in found]


def start(folder: Path, overrides: Mapping[str, Any]) -> Run:
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer

    config = config_of(folder, {"objective.alpha": 0.0, "objective.beta": 0.7, **DISTILL, **overrides})
    ranks = parallel.initialize(config.parallel, 0)
    objective = objectives.build_objective(config.objective, STEPS * MINIBATCHES)
    return Run(PolicyTrainer(config, read_architecture(folder), objective, ranks), ranks, config)


def divergences(folder: Path, overrides: Mapping[str, Any]) -> tuple[list[float], Any]:
    """Of each mini-batch, and the weights after the last."""
    from sdpg_megatron.weights import WeightStream

    run = start(folder, overrides)
    found = [value for step in range(STEPS) for value in run.step(step)]
    groups = {"tp_group": run.ranks.tensor_group, "pp_group": run.ranks.pipeline_group}
    buckets = WeightStream(run.policy_trainer.named_weights(), run.policy_trainer.arch, **groups)
    weights = {name: tensor for bucket in buckets for name, tensor in bucket}
    return found, weights if run.ranks.is_main else None


def plain_loop(folder: Path, name: str) -> tuple[list[float], dict[str, Tensor]]:
    """The same by hand: Hugging Face's model with two sets of weights, autograd and AdamW."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05, betas=(0.9, 0.999), eps=1e-2, weight_decay=0.0)
    found = []
    for step in range(STEPS):
        for number, part in enumerate(halves()):
            if name == "current" or (number == 0 and step % PERIODS.get(name, STEPS) == 0):
                move(teacher, student, 1.0)
            kls = [kl(student, teacher, *sample) for sample in part]
            found.append(float(torch.cat(kls).mean().detach()))
            loss = torch.stack([kl_S.mean() for kl_S in kls]).mean()
            optimizer.zero_grad()
            (0.7 * loss).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            if name == "ema":
                move(teacher, student, 0.3)
    return found, {name: p.detach() for name, p in student.named_parameters()}


def halves() -> list[list[tuple[Prompt, Sequence[int]]]]:
    """Prompt and response of the responses of each mini-batch."""
    samples = [[(g.group.prompt, c.tokens.tolist()) for c in g.group.completions] for g in scored_groups(300)]
    return [samples[0] + samples[1], samples[2] + samples[3]]


def kl(student: Any, teacher: Any, prompt: Prompt, reply: Sequence[int]) -> Tensor:
    """KL(student || teacher) at each token of a response."""
    logp_SV = response_logprobs(student, prompt.student_tokens, reply)
    with torch.no_grad():
        logq_SV = response_logprobs(teacher, prompt.teacher_tokens, reply)
    return (logp_SV.exp() * (logp_SV - logq_SV)).sum(1)


def response_logprobs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    logits_SV = model(torch.tensor([[*prompt, *response]])).logits[0]
    return torch.log_softmax(logits_SV[len(prompt) - 1 : -1].float(), -1)


def move(teacher: Any, student: Any, share: float) -> None:
    with torch.no_grad():
        for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.copy_((1 - share) * mine + share * other)


@pytest.mark.parametrize("name", TEACHERS)
def test_each_teacher_is_what_a_plain_loop_makes_of_it(model: Path, ranks: RankPool, name: str) -> None:
    found, weights = ranks.run(divergences, 1, model, TEACHERS[name])[0]
    expected, moved = plain_loop(model, name)
    assert found == pytest.approx(expected, rel=1e-3)
    for parameter, weight in moved.items():
        assert_close(weights[parameter], weight, rtol=1e-3, atol=1e-3, msg=lambda m, n=parameter: f"{n}: {m}")


def test_the_teachers_differ(model: Path) -> None:
    """The comparison above is about something: all agree about the first mini-batch, no two about the last."""
    found = {name: plain_loop(model, name)[0] for name in TEACHERS if name != "every_step"}
    assert len({round(values[0], 6) for values in found.values()}) == 1
    last = sorted(values[-1] for values in found.values())
    assert min(b - a for a, b in itertools.pairwise(last)) > 0.02 * last[0]


@pytest.mark.parametrize("name", ["rollout", "ema"])
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"parallel.tensor": 2}),
        (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
        (2, {"parallel.pipeline": 2}),
        (2, {}),
    ],
    ids=["tp2", "tp2_sp_pp2", "pp2", "dp2"],
)
def test_layouts_agree(untied: Path, ranks: RankPool, name: str, world: int, layout: dict[str, Any]) -> None:
    alone, weights = ranks.run(divergences, 1, untied, TEACHERS[name])[0]
    found, spread = ranks.run(divergences, world, untied, {**TEACHERS[name], **layout})[0]
    assert found == pytest.approx(alone, rel=2e-4)
    for parameter, weight in weights.items():
        assert_close(spread[parameter], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=parameter: f"{n}: {m}")


def rows_under_dropout(folder: Path) -> tuple[list[Tensor], list[Tensor], list[Tensor], bool, bool]:
    """Teacher rows, and old log-probs, of a model with dropout 0.1 in train mode; teacher rows without dropout;
    whether all modules are in train mode afterwards; whether two training passes differ."""
    from sdpg_megatron.mcore import model
    from sdpg_megatron.mcore.forward_step import hidden_states
    from sdpg_megatron.mcore.passes import logprobs, teacher_hidden

    plain = start(folder, {})
    expected = teacher_hidden(plain.policy_trainer.chunks, plain.minibatches()[0])
    build_config = model.transformer_config

    def with_dropout(*args: Any) -> Any:
        config = build_config(*args)
        config.hidden_dropout = 0.1
        return config

    with mock.patch.object(model, "transformer_config", with_dropout):
        run = start(folder, {})
    (chunk,), batches = run.policy_trainer.chunks, run.minibatches()[0]
    chunk.train()
    with torch.no_grad():
        one, other = (hidden_states(chunk, batches[0].student) for _ in range(2))
    rows = teacher_hidden([chunk], batches)
    scored = [
        *logprobs([chunk], batches, run.policy_trainer.head),
        *logprobs([chunk], batches, run.policy_trainer.head),
    ]
    return rows, expected, scored, all(m.training for m in chunk.modules()), not torch.equal(one, other)


def test_teacher_rows_and_log_probs_are_computed_without_dropout(model: Path, ranks: RankPool) -> None:
    rows, expected, scored, training, dropped = ranks.run(rows_under_dropout, 1, model)[0]
    assert dropped and training
    for found, without in zip(rows, expected, strict=True):
        assert torch.equal(found, without)
    half = len(scored) // 2
    assert all(torch.equal(one, other) for one, other in zip(scored[:half], scored[half:], strict=True))
