"""The trainer's own steps, one at a time and as often as one likes: for benchmarks/step.py."""

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


class StandingLearner:
    """A learner that takes the step that it is told to, on groups that it is given."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.inputs = config, load_inputs(config)
        self.ranks = parallel.initialize(config.parallel, config.seed)
        objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
        self.policy_trainer = PolicyTrainer(config, self.inputs.arch, objective, self.ranks)

    def learn(self, groups: Sequence[ScoredGroup], step: int, **changes: Any) -> dict[str, float]:
        """Passes and update of one optimizer step. `changes`: of the section `model`, for this step alone."""
        model = self.config.model.model_copy(update=changes)
        updater = PolicyUpdater(self.config.model_copy(update={"model": model}), self.inputs, self.policy_trainer)
        return values(updater.learn(step, updater.prepare(step, groups)))


class StandingTrainer(StandingLearner):
    """A whole trainer that takes the same step again and again."""

    def __init__(self, config: RunConfig, stack: ExitStack) -> None:
        """`stack`: gets what has to be closed."""
        super().__init__(config)
        store = CheckpointStore(config.run_dir, self.ranks, config.checkpoint)
        nobody = Interrupt(), Watchdog(config.watchdog)  # not entered: they watch nothing
        self._trainer = Trainer(
            config, self.inputs, self.policy_trainer, store, self._first(), RunFingerprint("", ""), *nobody, stack
        )
        self._trainer.serving.publish(0)

    def whole_step(self, step: int) -> dict[str, float]:
        """From the run's first prompts to published weights."""
        self._trainer.at = self._first()
        self._trainer.at.step = step
        metrics = self._trainer._train_step()
        assert metrics is not None, "nobody interrupts"
        return values(metrics)

    def drawn(self, step: int) -> tuple[list[Prompt], int]:
        """The prompts that `whole_step` takes, and the seed that it samples with."""
        taken = self._first().cursor.take(self.config.rollout.prompts_per_step)
        return [self.inputs.prompts[i] for i in taken], draw_seed(self.config.seed, f"rollout/{step}", 0)

    def _first(self) -> TrainState:
        return TrainState.first(self.config, self.inputs.prompts.size)


@contextmanager
def no_leftovers() -> Iterator[ExitStack]:
    """What is closed in the end. Megatron's wrappers refer to one another: an earlier learner is freed first."""
    gc.collect()
    with ExitStack() as stack:
        yield stack
