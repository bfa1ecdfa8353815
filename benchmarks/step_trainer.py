"""The trainer's own steps, one at a time and as often as one likes: for benchmarks/step.py."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from sdpg_megatron.checkpoint.store import CheckpointStore
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.mcore import parallel
from sdpg_megatron.observe.metrics import values
from sdpg_megatron.observe.progress import Progress
from sdpg_megatron.records import Prompt, ScoredGroup
from sdpg_megatron.train.engines import start_rollouts
from sdpg_megatron.train.inputs import load_inputs
from sdpg_megatron.train.interrupt import Interrupt
from sdpg_megatron.train.loop import Trainer


class StandingTrainer(Trainer):
    """The trainer without a run around it: it takes the step that it is told to, and stays where it is."""

    def __init__(self, config: RunConfig, stack: ExitStack) -> None:
        """`stack`: gets what has to be closed."""
        inputs, ranks = load_inputs(config), parallel.initialize(config.parallel, config.seed)
        super().__init__(config, inputs, ranks, CheckpointStore(config.run_dir, ranks, config.checkpoint), "")
        self.progress = Progress(config.steps, enabled=False)
        stack.callback(self.progress.close)
        self.prompt_log, self.interrupt = None, Interrupt()
        self.start = self.cursor.state()

    def start_engine(self, stack: ExitStack) -> None:
        """Whole steps need it."""
        self.rollouts = start_rollouts(self.config, self.inputs, self.ranks, self.progress.count)
        stack.callback(self.rollouts.close)
        self._publish()

    def learn(self, groups: Sequence[ScoredGroup], step: int, **changes: Any) -> dict[str, float]:
        """Passes and update of one optimizer step. `changes`: of the section `model`, for this step alone."""
        before, self.step = self.config, step
        self.config = before.model_copy(update={"model": before.model.model_copy(update=changes)})
        try:
            self.learner.begin(step)
            return values(self._update(self._prepare(groups, self._context(0)), self._context(0)))
        finally:
            self.config = before

    def whole_step(self, step: int) -> dict[str, float]:
        """From the run's first prompts to published weights."""
        self.step, self.cursor = step, Cursor.from_state(self.start, self.prompts.size)
        metrics = self._train_step()
        assert metrics is not None, "nobody interrupts"
        return values(metrics)

    def drawn(self, step: int) -> tuple[list[Prompt], int]:
        """The prompts that `whole_step` takes, and the seed that it samples with."""
        self.step, cursor = step, Cursor.from_state(self.start, self.prompts.size)
        prompts = [self.prompts[i] for i in cursor.take(self.config.rollout.prompts_per_step)]
        return prompts, self._sampling(0).seed


@contextmanager
def standing(config: RunConfig) -> Iterator[tuple[StandingTrainer, ExitStack]]:
    """A trainer, and what is closed with it."""
    gc.collect()  # Megatron's wrappers refer to one another: an earlier trainer's memory is free from here on
    with ExitStack() as stack:
        yield StandingTrainer(config, stack), stack
