"""Steps whose loss or gradient is not finite, on one rank alone: all ranks skip them, as if they had not been."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.dist import test_teachers
from tests.dist.test_moe import one_right
from tests.dist.test_optimizer import OVERLAP
from tests.dist.test_teachers import MINIBATCHES, Run, start
from tests.pool import RankPool
from tests.tiny import write_tiny_model

STEPS = 2
SPOILT = 1, 0
"""Rollout step and mini-batch."""
TEACHER = {"objective.teacher": "ema", "objective.teacher_ema": 0.3, "optimizer.schedule": "cosine"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel.tensor": 2}),
    "dp2": (2, {}),
    "dp2_plain_optimizer": (2, {"optimizer.distributed": False}),
    "dp2_overlap": (2, OVERLAP),
    "tp2_dp2": (4, {"parallel.tensor": 2, "parallel.sequence": True}),
    "pp2_dp2": (4, {"parallel.pipeline": 2}),
}
FAULTS = ("hidden", "loss", "gradient")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True, seed=3, layers=2)


@contextmanager
def spoilt(fault: str, run: Run) -> Iterator[None]:
    """While entered, the last data-parallel replica, or for gradients the last rank alone, computes what it should not.

    "hidden": a row of NaN; "loss": infinite with finite gradients; "gradient": infinite, and nothing else.
    """
    from sdpg_megatron.mcore import forward_step, policy_trainer

    rows, schedule = forward_step.rows, policy_trainer.passes.run_schedule
    calls: list[str] = []

    def broken_rows(*arguments: Any) -> Tensor:
        calls.append(fault)
        found = rows(*arguments)
        return found.index_fill(0, found.new_tensor([0], dtype=torch.int64), math.nan) if len(found) else found

    def broken_loss(terms: Any, context: Any) -> Any:
        calls.append(fault)
        found = type(run.policy_trainer.objective).loss(run.policy_trainer.objective, terms, context)
        infinite_T = torch.full_like(found.loss_T.detach(), math.inf)
        return type(found)(found.loss_T + infinite_T, found.metrics)

    def broken_gradient(chunks: Any, *arguments: Any, **options: Any) -> Any:
        found = schedule(chunks, *arguments, **options)
        if not options.get("forward_only"):
            calls.append(fault)
            for parameter in chunks[0].parameters():
                parameter.main_grad.fill_(math.inf)
        return found

    if fault == "gradient":
        here = run.ranks.rank == run.ranks.world - 1
        patch: Any = mock.patch.object(policy_trainer.passes, "run_schedule", broken_gradient)
    else:
        here = run.ranks.data == run.ranks.data_size - 1 and run.ranks.on_last_stage
        patch = (
            mock.patch.object(forward_step, "rows", broken_rows)
            if fault == "hidden"
            else mock.patch.object(run.policy_trainer.objective, "loss", broken_loss, create=True)
        )
    with patch if here else nullcontext():
        yield
    assert bool(calls) == here, "the fault was made"


def trained(folder: Path, overrides: dict[str, Any], fault: str | None) -> dict[str, Any]:
    """What all mini-batches leave behind where one of them is spoilt, or, without a fault, is left out."""
    from sdpg_megatron.objectives.base import StepContext

    run = start(folder, {**TEACHER, **overrides})
    policy_trainer = run.policy_trainer
    metrics = []
    for step in range(STEPS):
        policy_trainer.begin(step)
        for number, batches in enumerate(run.minibatches()):
            context = StepContext(step * MINIBATCHES + number, STEPS * MINIBATCHES)
            if (step, number) != SPOILT:
                metrics.append(policy_trainer.update(batches, context))
            elif fault is not None:
                with spoilt(fault, run):
                    metrics.append(policy_trainer.update(batches, context))
    states = [
        part.optimizer.state
        for part in getattr(policy_trainer.optimizer, "chained_optimizers", [policy_trainer.optimizer])
    ]
    return {
        "metrics": [{name: metric.value for name, metric in found.items()} for found in metrics],
        "weights": {name: weight.clone() for name, weight in policy_trainer.named_weights().items()},
        "moments": [value.clone() for state in states for values in state.values() for value in values.values()],
        "teacher": [kept.clone() for kept in policy_trainer.teacher.kept],
        "schedule": policy_trainer.scheduler.state_dict(),
    }


def with_each_fault(folder: Path, overrides: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
    return {fault: trained(folder, overrides, fault) for fault in (None, *FAULTS)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(model: Path, ranks: RankPool, layout: str) -> None:
    for found in ranks.run(with_each_fault, LAYOUTS[layout][0], model, LAYOUTS[layout][1]):
        expected = found.pop(None)
        for fault, after in found.items():
            check(expected, after, fault)


def check(before: dict[str, Any], after: dict[str, Any], fault: str | None) -> None:
    skipped = after["metrics"].pop(SPOILT[0] * MINIBATCHES + SPOILT[1])
    assert skipped.pop("optimizer/skipped") == 1
    assert (skipped.pop("train/nonfinite_tokens") > 0) == (fault != "gradient")
    assert not skipped, "nothing else is known of such a step"
    assert after["metrics"] == before["metrics"]
    assert all(metrics["optimizer/skipped"] == 0 for metrics in after["metrics"])
    assert after["schedule"] == before["schedule"]
    assert after["weights"].keys() == before["weights"].keys()
    assert all(torch.equal(after["weights"][name], weight) for name, weight in before["weights"].items())
    for part in ("moments", "teacher"):
        assert before[part]
        assert all(torch.equal(a, b) for a, b in zip(after[part], before[part], strict=True))


UNEVEN = {
    "objective.gate": True,
    "model.router_aux_loss": 0.7,  # the ranks count tokens together between the teacher's pass and the student's
    "optimizer.minibatches": 1,
    "parallel.timeout": 120.0,  # of a rank that waits where no other comes
}


def skipped_second(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """What three steps leave behind, each on the same micro-batches: on one rank alone the teacher reads."""
    from sdpg_megatron.objectives.base import StepContext

    with mock.patch.object(test_teachers, "scored_groups", one_right):
        run = start(folder, {**UNEVEN, **overrides})
        batches, _ = run.minibatches()
    skipped = []
    for step in range(3):
        run.policy_trainer.begin(step)
        with spoilt("gradient", run) if step == 1 else nullcontext():
            metrics = run.policy_trainer.update(batches, StepContext(step, 3))
        skipped.append(metrics["optimizer/skipped"].value)
    return {
        "taught": sum(batch.teacher is not None for batch in batches),
        "skipped": skipped,
        "weights": {name: weight.clone() for name, weight in run.policy_trainer.named_weights().items()},
    }


def test_after_a_skipped_step_a_rank_whose_teacher_reads_does_not_wait_for_one_whose_does_not(
    tmp_path: Path, ranks: RankPool
) -> None:
    """Megatron has weights gathered anew after every training pass, in whichever pass comes next."""
    mixture = write_tiny_model(tmp_path, "qwen3_moe", tied=False, seed=2, layers=2)
    expected = ranks.run(skipped_second, 2, mixture, {})
    found = ranks.run(skipped_second, 2, mixture, OVERLAP)
    assert [rank["taught"] for rank in found] in ([0, 1], [1, 0])
    for before, after in zip(expected, found, strict=True):
        assert after["skipped"] == before["skipped"] == [0, 1, 0]
        for name, weight in before["weights"].items():
            torch.testing.assert_close(after["weights"][name], weight, rtol=1e-5, atol=1e-6)
