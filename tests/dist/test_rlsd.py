"""RLSD's weight over two rollouts of two mini-batches, in several layouts, against a plain Hugging Face loop."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.records import ScoredGroup
from tests.dist.test_step import config_of, scored_groups
from tests.dist.test_teachers import response_logprobs
from tests.pool import RankPool
from tests.tiny import write_tiny_model

STEPS, MINIBATCHES, DECAY = 2, 2, 8
RLSD = {
    "objective.name": "rlsd",
    "objective.beta": 0.0,
    "objective.alpha": 0.0,
    "objective.credit_decay_steps": DECAY,
    "optimizer.minibatches": MINIBATCHES,
    "optimizer.lr": 0.05,
    "optimizer.weight_decay": 0.0,
    "rollout.mismatch_limit": None,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "cp2": (2, {"parallel.context": 2}),
    "tp2_sp_cp2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.context": 2}),
    "tp2_sp_pp2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("untied"), "qwen3", tied=False, seed=3, layers=2)


def some_right(vocab: int) -> list[ScoredGroup]:
    """Four groups of four responses; in all but the first some are right."""
    rewards = [(1.0,) * 4, (1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0), (1.0, 1.0, 0.0, 1.0)]
    groups = zip(scored_groups(vocab), rewards, strict=True)
    return [replace(scored, rewards=given, advantages=group_advantages(given)) for scored, given in groups]


def trained(folder: Path, overrides: dict[str, Any]) -> tuple[list[dict[str, float]], Any]:
    """Metrics of each rollout step as the trainer makes it, and the weights after the last."""
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
    from sdpg_megatron.train.inputs import Inputs
    from sdpg_megatron.train.update import PolicyUpdater
    from sdpg_megatron.weights import WeightStream

    config = config_of(folder, {**RLSD, **overrides})
    ranks = parallel.initialize(config.parallel, 0)
    arch = read_architecture(folder)
    policy_trainer = PolicyTrainer(
        config, arch, objectives.build_objective(config.objective, config.total_optimizer_steps), ranks
    )
    unread: Any = None
    updater = PolicyUpdater(
        config, Inputs(arch, tokenizer=unread, stop_ids=(), prompts=unread, held_out=unread), policy_trainer
    )
    groups, metrics = some_right(arch.vocab_size), []
    for step in range(STEPS):
        found = updater.update(step, updater.prepare(step, groups))
        metrics.append({name: metric.value for name, metric in found.items()})
    stream = WeightStream(
        policy_trainer.named_weights(), arch, tp_group=ranks.tensor_group, pp_group=ranks.pipeline_group
    )
    weights = {name: tensor for bucket in stream for name, tensor in bucket}
    return metrics, weights if ranks.is_main else None


def sampled(model: Any, prompt: tuple[int, ...], reply: tuple[int, ...]) -> Tensor:
    """Log-probs of a response's tokens."""
    return response_logprobs(model, prompt, reply)[torch.arange(len(reply)), torch.tensor(reply)]


@cache
def plain_loop(folder: Path, ratio: str, teacher: str = "current") -> tuple[list[float], dict[str, Tensor]]:
    """The mean weight of each rollout step, and the weights after the last, by the formula."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reader = model if teacher == "current" else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.999), eps=1e-2, weight_decay=0.0)
    groups, means = some_right(300), []
    for step in range(STEPS):
        parts = [
            [
                (g.group.prompt, c.tokens.tolist(), a)
                for g in half
                for c, a in zip(g.group.completions, g.advantages, strict=True)
            ]
            for half in (groups[:2], groups[2:])
        ]
        with torch.no_grad():
            before = [
                [(sampled(model, p.student_tokens, y), sampled(reader, p.teacher_tokens, y)) for p, y, _ in part]
                for part in parts
            ]
        weights = []
        for number, (part, known) in enumerate(zip(parts, before, strict=True)):
            share = 0.5 * (1 - (step * MINIBATCHES + number + 1) / DECAY)
            total, tokens = torch.zeros(()), sum(len(y) for _, y, _ in part)
            for (prompt, reply, advantage), (old_S, logq_S) in zip(part, known, strict=True):
                if not advantage:
                    continue
                logp_S = sampled(model, prompt.student_tokens, reply)
                gap_S = logq_S - old_S
                if ratio == "current":
                    with torch.no_grad():
                        gap_S = sampled(reader, prompt.teacher_tokens, reply) - logp_S.detach()
                scale_S = (gap_S if advantage > 0 else -gap_S).exp().clamp(0.8, 1.2)
                weights.append((1 - share) + share * scale_S)
                a_S, rho_S = advantage * weights[-1], (logp_S - old_S).exp()
                loss_S = torch.maximum(-a_S * rho_S, -a_S * rho_S.clamp(0.8, 1.2))
                total = total + (loss_S if advantage > 0 else torch.minimum(loss_S, -3.0 * a_S)).sum()
            optimizer.zero_grad()
            (total / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        means.append(float(torch.cat(weights).mean()))
    return means, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weight_is_of_the_moment_before_a_rollouts_first_update(model: Path, ranks: RankPool, layout: str) -> None:
    expected, moved = plain_loop(model, "rollout")
    world, overrides = LAYOUTS[layout]
    metrics, weights = ranks.run(trained, world, model, overrides)[0]
    assert [step["credit/weight"] for step in metrics] == pytest.approx(expected, rel=1e-3)
    assert "distill/kl" not in metrics[0] and metrics[0]["credit/clip_fraction"] > 0
    for parameter, weight in moved.items():
        assert_close(weights[parameter], weight, rtol=1e-3, atol=1e-3, msg=lambda m, n=parameter: f"{n}: {m}")


def test_the_weight_is_of_the_teachers_own_weights(model: Path, ranks: RankPool) -> None:
    expected, _ = plain_loop(model, "rollout", "initial")
    metrics, _ = ranks.run(trained, 2, model, {"objective.teacher": "initial", "parallel.tensor": 2})[0]
    assert [step["credit/weight"] for step in metrics] == pytest.approx(expected, rel=1e-3)
    assert abs(expected[1] - plain_loop(model, "rollout")[0][1]) > 1e-3


def test_the_weight_can_follow_the_current_policy(model: Path, ranks: RankPool) -> None:
    """As the SDPG paper's appendix B writes it; the two forms differ from the second mini-batch on."""
    expected, moved = plain_loop(model, "current")
    metrics, weights = ranks.run(trained, 1, model, {"objective.credit_ratio": "current"})[0]
    assert [step["credit/weight"] for step in metrics] == pytest.approx(expected, rel=1e-3)
    for parameter, weight in moved.items():
        assert_close(weights[parameter], weight, rtol=1e-3, atol=1e-3, msg=lambda m, n=parameter: f"{n}: {m}")
    once, _ = plain_loop(model, "rollout")
    assert min(abs(a - b) for a, b in zip(once, expected, strict=True)) > 1e-3
