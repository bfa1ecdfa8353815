"""Training steps on a tiny Qwen3: every layout and every split gives what a single process gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from tests.completions import make_completion
from tests.pool import RankPool
from tests.tiny import write_tiny_model

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_plain_optimizer": (2, {"optimizer.distributed": False}),
    "cp2_plain_optimizer": (2, {"parallel.context": 2, "optimizer.distributed": False}),
    "cp4": (4, {"parallel.context": 4}),
    "micro_batches_of_3": (1, {"optimizer.micro_batch_size": 3}),
    "small_head_chunks": (1, {"head.chunk_rows": 3}),
    "head_recompute": (1, {"head.schedule": "recompute"}),
    "head_without_main_grad": (1, {"head.main_grad": False}),
    "tp2_sp_head_recompute": (2, {"parallel.tensor": 2, "parallel.sequence": True, "head.schedule": "recompute"}),
    "tp2_pp2_head_without_main_grad": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "head.main_grad": False}),
}
"""What tests/dist/test_invariance.py does not have."""
UNTIED: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"parallel.pipeline": 2}),
    "vpp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "tp2_sp_pp2": (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2}),
}
"""Layouts in which it matters where the output matrix is."""


def config_of(folder: Path, overrides: dict[str, Any]) -> RunConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "data": {"train": []},
        "rollout": {"prompts_per_step": 4, "group_size": 4},
        # alpha and beta so large that neither term can hide behind the outcome term; eps so large that Adam's first
        # step is a smooth function of the gradient and not its sign
        "objective": {"alpha": 0.3, "beta": 0.7, "beta_warmup_steps": 0, "beta_decay_steps": 0},
        "optimizer": {"lr": 1e-2, "eps": 1e-2, "warmup_steps": 0, "micro_batch_size": 4},
    }
    for key, value in overrides.items():
        section, field = key.split(".")
        tree.setdefault(section, {})[field] = value
    return parse({"run_dir": "unused", "steps": 4, **tree})


def scored_groups(vocab: int, aggregation_seed: int = 0) -> list[ScoredGroup]:
    """Four groups of four responses with lengths from 1 to 9; one group is dead."""
    draw = random.Random(aggregation_seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(count))

    groups = []
    for number in range(4):
        student = tokens(draw.randint(3, 7))
        prompt = Prompt(f"test:{number}", student, tokens(4) + student, "answer")
        responses = [tokens(draw.randint(1, 9)) for _ in range(4)]
        completions = tuple(
            make_completion(response, tuple(draw.uniform(-6, -4) for _ in response), "stop", 0, "")
            for response in responses
        )
        rewards = tuple(float(draw.random() < 0.5) for _ in completions) if number else (1.0,) * 4
        groups.append(ScoredGroup(Group(prompt, completions), rewards, group_advantages(rewards)))
    return groups


def two_steps(folder: Path, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """Two optimizer steps (the second has moved away from the reference); on the leader, what came of them."""
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.batching.collate import PackingLayout
    from sdpg_megatron.batching.micro_batches import Limit
    from sdpg_megatron.batching.samples import make_samples
    from sdpg_megatron.batching.step_batch import build_step, with_corrections
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.model import named_parameters
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
    from sdpg_megatron.objectives.base import StepContext
    from sdpg_megatron.weights import WeightStream

    config = config_of(folder, overrides)
    ranks = parallel.initialize(config.parallel, config.seed)
    objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
    policy_trainer = PolicyTrainer(config, read_architecture(folder), objective, ranks)
    samples = make_samples(
        scored_groups(policy_trainer.arch.vocab_size), config.objective, distill_enabled=objective.distill_enabled
    )
    batch = build_step(
        samples,
        regularized=True,
        limit=Limit.of(config),
        layout=PackingLayout.of(config, ranks),
        device=policy_trainer.device,
    )
    batches = batch.micro_batches
    if config.objective.correction != "none":
        batches = with_corrections(policy_trainer.with_old_logprobs(batches), config.objective, ranks.context_group)
    metrics = [
        policy_trainer.update(policy_trainer.with_reference(batches), StepContext(step, config.total_optimizer_steps))
        for step in range(2)
    ]

    def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        buckets = WeightStream(
            tensors,
            policy_trainer.arch,
            tp_group=ranks.tensor_group,
            pp_group=ranks.pipeline_group,
            expert_group=ranks.expert_group,
            expert_tensor=ranks.expert_tensor_size,
        )
        return {name: tensor for bucket in buckets for name, tensor in bucket}

    weights = whole(policy_trainer.named_weights())
    gradients = whole({name: p.main_grad for name, p in named_parameters(policy_trainer.chunks)})
    values = [{name: metric.value for name, metric in step.items()} for step in metrics]
    return {"metrics": values, "weights": weights, "gradients": gradients} if ranks.is_main else None


MODELS = [*(("tied", layout) for layout in LAYOUTS), *(("untied", layout) for layout in UNTIED)]
each_model = pytest.mark.parametrize("model", ["tied", "untied"], indirect=True)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tied = request.param == "tied"
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=tied, seed=3)


@pytest.fixture(scope="module")
def single(model: Path, ranks: RankPool) -> dict[str, Any]:
    return ranks.run(two_steps, 1, model, {})[0]


@pytest.mark.parametrize(("model", "layout"), MODELS, indirect=["model"])
def test_layouts_and_splits_agree(model: Path, single: dict[str, Any], ranks: RankPool, layout: str) -> None:
    world, overrides = {**LAYOUTS, **UNTIED}[layout]
    found = ranks.run(two_steps, world, model, overrides)[0]
    for expected, step in zip(single["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    assert single["weights"].keys() == found["weights"].keys()
    for name, expected in single["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    copies = world // (overrides.get("parallel.tensor", 1) * overrides.get("parallel.pipeline", 1))
    if copies == 1 or overrides.get("optimizer.distributed") is False:
        # With a sharded optimizer each data- or context-parallel rank holds its part of the summed gradient alone.
        for name, expected in single["gradients"].items():
            torch.testing.assert_close(
                found["gradients"][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_corrections_weigh_the_loss_alike_on_any_layout(model: Path, single: dict[str, Any], ranks: RankPool) -> None:
    """The log-probs that the responses came with are far from the model's: masks and weights are not 1."""
    corrected = {"objective.correction": "mask", "objective.correction_level": "sequence"}
    alone = ranks.run(two_steps, 1, model, corrected)[0]
    spread = {"parallel.tensor": 2, "parallel.pipeline": 2, "optimizer.micro_batch_size": 3}
    found = ranks.run(two_steps, 4, model, {**corrected, **spread})[0]
    shared = ranks.run(two_steps, 2, model, {**corrected, "parallel.context": 2})[0]
    for expected, *steps in zip(alone["metrics"], found["metrics"], shared["metrics"], strict=True):
        for step in steps:
            assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shared["weights"][name], alone["weights"][name], rtol=1e-4, atol=1e-6)
    assert 0 < alone["metrics"][0]["rollout/correction"] != 1
    assert alone["metrics"][0]["train/loss"] != pytest.approx(single["metrics"][0]["train/loss"], rel=0.05)


@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_an_entropy_bonus_is_the_same_on_any_layout(model: Path, single: dict[str, Any], ranks: RankPool) -> None:
    alone = ranks.run(two_steps, 1, model, {"objective.entropy_coefficient": 0.5})[0]
    spread = {"parallel.tensor": 2, "parallel.sequence": True, "optimizer.micro_batch_size": 3}
    found = ranks.run(two_steps, 2, model, {"objective.entropy_coefficient": 0.5, **spread})[0]
    for expected, step in zip(alone["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(gradient, single["gradients"][name], rtol=1e-2, atol=1e-4), name
    bonus = 0.5 * single["metrics"][0]["train/entropy"]
    assert alone["metrics"][0]["train/loss"] == pytest.approx(single["metrics"][0]["train/loss"] - bonus, rel=1e-4)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {"optimizer.micro_batch_size": 3}),
        (2, {"parallel.tensor": 2, "optimizer.micro_batch_size": 3}),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
        (2, {"parallel.context": 2, "optimizer.distributed": False}),
        (2, {"optimizer.distributed": False}),
    ],
    ids=["micro_batches", "tp2", "vpp2", "cp2", "dp2"],
)
@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_an_objective_over_sequences_is_the_same_on_any_layout(
    model: Path, ranks: RankPool, world: int, layout: dict[str, Any]
) -> None:
    """GSPO's ratio is a mean over a response, whose tokens context parallelism shards over ranks."""
    gspo = {"objective.name": "examples.objectives.gspo:GSPO", "objective.clip_low": 0.9, "objective.clip_high": 9.0}
    gspo |= {"objective.correction": "truncate"}  # which keeps the log-probs from before the first of the two updates
    alone = ranks.run(two_steps, 1, model, gspo)[0]
    found = ranks.run(two_steps, world, model, {**gspo, **layout})[0]
    for expected, step in zip(alone["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    assert alone["metrics"][1]["policy/ratio"] != pytest.approx(1.0, abs=1e-6)
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


@each_model
def test_the_step_teaches(single: dict[str, Any]) -> None:
    """The comparison above is about something: every term is there, and every weight moves."""
    first, second = single["metrics"]
    assert first["distill/kl"] > 1e-3
    assert first["distill/gradient_ratio"] > 0  # measured at the first of ten steps
    assert "distill/gradient_ratio" not in second
    assert abs(first["reference/kl"]) < 1e-9 < second["reference/kl"]
    assert all(gradient.abs().max() > 0 for gradient in single["gradients"].values())
