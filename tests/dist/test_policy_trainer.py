"""What the learner does besides the step that tests/dist/test_step.py compares."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.dist.test_step import config_of, scored_groups
from tests.pool import RankPool
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True, seed=3)


def updates(
    folder: Path, overrides: dict[str, object], scale: float = 1.0, regularized: bool = True
) -> list[float | None]:
    """Gradient norms of two updates on advantages multiplied by `scale`; None where one was skipped."""
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.batching.collate import PackingLayout
    from sdpg_megatron.batching.micro_batches import Limit
    from sdpg_megatron.batching.samples import distill_nothing, make_samples
    from sdpg_megatron.batching.step_batch import build_step
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
    from sdpg_megatron.objectives.base import StepContext

    config = config_of(folder, {"objective.alpha": 0.0, "objective.beta": 0.0, **overrides})
    ranks = parallel.initialize(config.parallel, 0)
    policy_trainer = PolicyTrainer(
        config, read_architecture(folder), objectives.build_objective(config.objective, 4), ranks
    )
    samples = make_samples(
        scored_groups(policy_trainer.arch.vocab_size), config.objective, distill_enabled=distill_nothing
    )
    batch = build_step(
        [
            dataclasses.replace(sample, advantage=sample.advantage * scale)
            for sample in samples
            if sample.advantage or scale == 1
        ],
        regularized=regularized,
        limit=Limit.of(config),
        layout=PackingLayout.of(config, ranks),
        device=policy_trainer.device,
    )
    found = [policy_trainer.update(batch.micro_batches, StepContext(step, 4)) for step in range(2)]
    return [None if step["optimizer/skipped"].value else step["optimizer/grad_norm"].value for step in found]


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_is_seen_with_any_bound(model: Path, ranks: RankPool, clip: float) -> None:
    found = ranks.run(updates, 2, model, {"parallel.tensor": 2, "optimizer.clip_grad": clip}, float("inf"))
    assert found == [[None, None]] * 2


def test_the_norm_is_reported_without_a_bound_too(model: Path, ranks: RankPool) -> None:
    (bounded,) = ranks.run(updates, 1, model, {"optimizer.clip_grad": 1.0})
    (free,) = ranks.run(updates, 1, model, {"optimizer.clip_grad": 0.0})
    assert bounded[0] == free[0] is not None


def test_leaving_out_what_teaches_nothing_changes_no_gradient(model: Path, ranks: RankPool) -> None:
    (all_samples,) = ranks.run(updates, 1, model, {})
    (live_samples,) = ranks.run(updates, 1, model, {}, regularized=False)
    assert live_samples == pytest.approx(all_samples, rel=1e-5)


def raised(folder: Path, overrides: dict[str, object]) -> str:
    from sdpg_megatron.errors import NonFiniteWeightsError

    try:
        updates(folder, overrides)
    except NonFiniteWeightsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (2, {"parallel.tensor": 2}),
        (2, {"parallel.pipeline": 2}),
        (2, {"optimizer.overlap_param_gather": True}),
    ],
    ids=["single", "tp2", "pp2", "dp2_overlap"],
)
def test_an_update_that_makes_weights_infinite_ends_the_run_on_all_ranks(
    model: Path, ranks: RankPool, world: int, layout: dict[str, object]
) -> None:
    too_much = {"optimizer.lr": 1e3, "optimizer.weight_decay": 1e36}  # the product is no float32
    overlap = {"optimizer.overlap_grad_reduce": True} if "optimizer.overlap_param_gather" in layout else {}
    found = ranks.run(raised, world, model, {**too_much, **layout, **overlap})
    assert len(set(found)) == 1
    assert found[0].startswith("after optimizer step 0: tensor 'model."), found[0]
    assert "not finite, expected finite numbers" in found[0] and "neither published nor saved. Fix: " in found[0]


def swap(folder: Path) -> tuple[bool, bool, bool]:
    """(the frozen weights were in place, the live ones came back, also after an error)."""
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.frozen_weights import FrozenWeights
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer

    config = config_of(folder, {})
    ranks = parallel.initialize(config.parallel, 0)
    policy_trainer = PolicyTrainer(
        config, read_architecture(folder), objectives.build_objective(config.objective, 4), ranks
    )
    frozen = FrozenWeights(policy_trainer.chunks)
    first = {name: weight.clone() for name, weight in policy_trainer.named_weights().items()}
    for weight in policy_trainer.named_weights().values():
        weight += 1
    live = {name: (weight.data_ptr(), weight.clone()) for name, weight in policy_trainer.named_weights().items()}

    def is_live() -> bool:
        now = policy_trainer.named_weights()
        return all(now[n].data_ptr() == place and torch.equal(now[n], value) for n, (place, value) in live.items())

    with frozen.swapped_in(policy_trainer.chunks):
        in_place = all(torch.equal(weight, first[name]) for name, weight in policy_trainer.named_weights().items())
    back = is_live()
    try:
        with frozen.swapped_in(policy_trainer.chunks):
            raise RuntimeError
    except RuntimeError:
        return in_place, back, is_live()


def test_frozen_weights_swap_in_and_out(model: Path, ranks: RankPool) -> None:
    assert ranks.run(swap, 1, model) == [(True, True, True)]
