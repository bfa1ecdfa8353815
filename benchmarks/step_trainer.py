"""Single steps of the trainer, repeatable, for benchmarks/step.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from sdpg_megatron import objectives
from sdpg_megatron.checkpoint.store import CheckpointStore
from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
from sdpg_megatron.observe.metrics import values
from sdpg_megatron.records import Prompt, ScoredGroup
from sdpg_megatron.runtime.interrupt import Interrupt
from sdpg_megatron.runtime.watchdog import Watchdog
from sdpg_megatron.train.inputs import load_inputs
from sdpg_megatron.train.loop import Trainer
from sdpg_megatron.train.run_fingerprint import RunFingerprint
from sdpg_megatron.train.seeds import draw_seed
from sdpg_megatron.train.state import TrainState
from sdpg_megatron.train.update import PolicyUpdater


class StandingPolicyTrainer:
    """A policy trainer that takes a given step on given groups."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.inputs = config, load_inputs(config)
        self.ranks = parallel.initialize(config.parallel, config.seed)
        objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
        self.policy_trainer = PolicyTrainer(config, self.inputs.arch, objective, self.ranks)

    def learn(self, groups: Sequence[ScoredGroup], step: int, **changes: Any) -> dict[str, float]:
        """Passes and update of one optimizer step. `changes`: fields of the section `model`, for this step only."""
        model = self.config.model.model_copy(update=changes)
        updater = PolicyUpdater(self.config.model_copy(update={"model": model}), self.inputs, self.policy_trainer)
        return values(updater.update(step, updater.prepare(step, groups)))


class StandingTrainer(StandingPolicyTrainer):
    """A complete trainer that repeats the same step."""

    def __init__(self, config: RunConfig, stack: ExitStack) -> None:
        """`stack`: closes the trainer's resources."""
        super().__init__(config)
        store = CheckpointStore(config.run_dir, self.ranks, config.checkpoint)
        inactive = Interrupt(), Watchdog(config.watchdog)  # never entered
        self._trainer = Trainer(
            config, self.inputs, self.policy_trainer, store, self._first(), RunFingerprint("", ""), *inactive, stack
        )
        self._trainer.serving.publish(0)

    def whole_step(self, step: int) -> dict[str, float]:
        """Take a complete step, from the run's first prompts to published weights."""
        self._trainer.state = self._first()
        self._trainer.state.step = step
        metrics = self._trainer._train_step()
        assert metrics is not None, "the step was not interrupted"
        return values(metrics)

    def prompts_of_step(self, step: int) -> tuple[list[Prompt], int]:
        """Prompts and sampling seed of `whole_step`."""
        taken = self._first().cursor.take(self.config.rollout.prompts_per_step)
        return [self.inputs.prompts[i] for i in taken], draw_seed(self.config.seed, f"rollout/{step}", 0)

    def _first(self) -> TrainState:
        return TrainState.first(self.config, self.inputs.prompts.size)


@contextmanager
def no_leftovers() -> Iterator[ExitStack]:
    """Stack that is closed on exit. Frees an earlier trainer first: Megatron has reference cycles."""
    gc.collect()
    with ExitStack() as stack:
        yield stack
