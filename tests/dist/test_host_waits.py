"""Passes and loss of a micro-batch let the host run ahead of a GPU: they read no number, and copy none to the device.

Seen on a CPU, as operations of torch. Megatron's own waits are once a step.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist.test_packed_launches import WAITS
from tests.dist.test_step import config_of, scored_groups
from tests.pool import RankPool
from tests.tiny import write_tiny_model

LITERAL = "lift_fresh"
"""`torch.tensor`: a copy from pageable memory where it is given a device."""
EVERYTHING: dict[str, object] = {"objective.policy": "ratio", "objective.divergence_clip": 0.1}
"""With metrics that count some tokens alone."""


class Waits(TorchDispatchMode):
    """Counts what makes the host wait, or would on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
        if name in WAITS or name == LITERAL or masked:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def learner_and_batches(folder: Path, overrides: dict[str, object], size: int) -> tuple[Any, list[Any]]:
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.batching.collate import PackingLayout
    from sdpg_megatron.batching.micro_batches import Limit
    from sdpg_megatron.batching.samples import make_samples
    from sdpg_megatron.batching.step_batch import build_step
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer

    config = config_of(folder, {"objective.gate": False, "optimizer.micro_batch_size": size, **overrides})
    ranks = parallel.initialize(config.parallel, 0)
    objective = objectives.build_objective(config.objective, 4)
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
    return policy_trainer, policy_trainer.with_reference(batch.micro_batches)


def waits_of_a_micro_batch(folder: Path, overrides: dict[str, object]) -> tuple[Counter[str], Counter[str]]:
    """Waits of forward-only passes and of the training pass; and those of its loss, literals among them."""
    from sdpg_megatron.mcore import passes
    from sdpg_megatron.mcore.forward_step import ForwardStep
    from sdpg_megatron.objectives.base import StepContext

    policy_trainer, (batch, *_) = learner_and_batches(folder, overrides, 4)
    step = ForwardStep(policy_trainer.objective, StepContext(0, 4), policy_trainer.head, measure_gradient_ratio=True)
    (chunk,) = policy_trainer.chunks
    with Waits() as waits:
        passes.logprobs(policy_trainer.chunks, [batch], policy_trainer.head)
        (hidden_GH,) = passes.teacher_hidden(policy_trainer.chunks, [batch])
        batch = dataclasses.replace(batch, teacher_hidden_GH=hidden_GH)
        hidden_BSH, loss_of = step(iter([batch]), chunk)
        with Waits() as in_loss:
            loss, _, _ = loss_of(hidden_BSH)
            loss.backward()
    del waits.count[LITERAL]
    return waits.count, in_loss.count


@pytest.mark.parametrize("overrides", [{}, EVERYTHING, {"model.packed": False}], ids=["sdpg", "masked", "padded"])
def test_a_micro_batch_waits_for_nothing(tmp_path: Path, ranks: RankPool, overrides: dict[str, object]) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen3", tied=True, seed=2, layers=2)
    assert ranks.run(waits_of_a_micro_batch, 1, folder, overrides) == [(Counter(), Counter())]


def waits_of_a_step(folder: Path, overrides: dict[str, object], size: int) -> tuple[int, int]:
    """Count the host's waits while router tokens are numbered, and in a whole update."""
    from sdpg_megatron.objectives.base import StepContext

    policy_trainer, batches = learner_and_batches(folder, overrides, size)
    policy_trainer.update(batches, StepContext(0, 4))
    with Waits() as of_routing, policy_trainer.routing.step(batches):
        pass
    with Waits() as of_update:
        policy_trainer.update(batches, StepContext(1, 4))
    for waits in (of_routing, of_update):
        del waits.count[LITERAL]
    return of_routing.count.total(), of_update.count.total()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_waits_of_a_step_do_not_grow_with_its_micro_batches(tmp_path: Path, ranks: RankPool, family: Any) -> None:
    experts = family == "qwen3_moe"
    folder = write_tiny_model(tmp_path / "model", family, tied=True, seed=2, layers=2)
    losses = {"model.router_aux_loss": 0.1} if experts else {}
    (few,), (many,) = (ranks.run(waits_of_a_step, 1, folder, losses, size) for size in (16, 2))
    assert few[0] == many[0]
    assert experts or few[1] == many[1]  # megatron-core reads each layer's numbers of tokens for its experts
