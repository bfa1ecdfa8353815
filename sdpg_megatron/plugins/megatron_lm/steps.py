"""Rollouts of a host's training steps: publish, generate, score, select, build mini-batches."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdpg_megatron.batching.step_batch import StepBatch
from sdpg_megatron.checkpoint.prefetched_rollouts import PrefetchedRollouts
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.errors import CheckpointError
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.policy import Policy
from sdpg_megatron.observe.files import writing
from sdpg_megatron.observe.metrics import Metric
from sdpg_megatron.observe.progress import Progress
from sdpg_megatron.runtime.run_lock import RunLock
from sdpg_megatron.runtime.watchdog import Watchdog
from sdpg_megatron.train.collect import Collector
from sdpg_megatron.train.inputs import Inputs
from sdpg_megatron.train.phases import Phases
from sdpg_megatron.train.run_dir import make_run_dir
from sdpg_megatron.train.serving import Serving
from sdpg_megatron.train.update import StepPreparer

CURSORS = "cursors.jsonl"
"""File in the run's folder: the data cursor after each step, one a line. A later line of a step replaces an earlier."""


class HostSteps:
    """Rollout side of a host's steps. Every rank calls every method."""

    def __init__(self, config: RunConfig, inputs: Inputs, policy: Policy, step: int, stack: ExitStack) -> None:
        """
        Args:
            step: number of steps before the first.
            stack: closes engines, watchdog and the lock of the run's folder.
        """
        self._config, self._inputs, self._policy, self._ranks = config, inputs, policy, policy.ranks
        on_main(self._ranks, lambda: self._claim(stack))
        watchdog = stack.enter_context(Watchdog(config.watchdog))
        stack.enter_context(watchdog.monitor_ranks(self._ranks))
        self._phases = Phases(Progress(config.steps, done=step, enabled=False), watchdog)
        self._serving = Serving(config, inputs, policy, self._phases, on_progress=lambda *_: None, stop=lambda: False)
        stack.callback(self._serving.close)
        self._serving.rollouts.check_verifier(inputs.prompts[0])
        self._collector = Collector(config, inputs.prompts, self._serving.rollouts, policy.objective, self._ranks)
        stack.callback(self._collector.cancel)
        self.preparer = StepPreparer(config, inputs, policy)
        cursor = Cursor(inputs.prompts.size, config.seed, config.data.shuffle)
        self._cursor = self._read_cursor(step) if step else cursor
        self._ahead = False
        self._step = step

    def run(self, step: int) -> tuple[list[StepBatch], dict[str, Metric]]:
        """Publish the weights after `step`, and collect and build the mini-batches of the step after it."""
        if step != self._step:
            self._step = step
            self._serving.trained(step)
        with self._phases("rollout"):
            prefetched: PrefetchedRollouts | None = self._collector.finish() if self._ahead else None
        self._policy.gather()
        self._serving.publish(step)
        with self._phases("rollout"):
            selection = self._collector.collect(step, self._cursor, prefetched)
        on_main(self._ranks, lambda: self._write_cursor(step + 1))
        self._ahead = self._config.rollout.ahead > 0 and step + 1 < self._config.steps
        groups = self.preparer.with_context(selection.kept)
        if self._ahead:
            self._collector.begin(step + 1, self._cursor)
        with self._phases("prepare"):
            batches = self.preparer.prepare(step, groups)
        return batches, {**self._collector.describe(step, selection), **self._phases.take()}

    def _claim(self, stack: ExitStack) -> None:
        make_run_dir(self._config.run_dir)
        stack.callback(RunLock(self._config.run_dir).close)

    @property
    def _cursors(self) -> Path:
        return self._config.run_dir / CURSORS

    def _write_cursor(self, step: int) -> None:
        with writing(self._cursors), self._cursors.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "cursor": self._cursor.state()}) + "\n")

    def _read_cursor(self, step: int) -> Cursor:
        def read() -> Any:
            text = self._cursors.read_text(encoding="utf-8") if self._cursors.exists() else ""
            # Without the last line if a run was killed while it wrote one.
            lines = text[: text.rfind("\n") + 1].splitlines()
            found = [entry["cursor"] for entry in map(json.loads, lines) if entry["step"] == step]
            if not found:
                raise CheckpointError(
                    f"{self._cursors}: found no position in the data after step {step}, from which the checkpoint "
                    "continues. Fix: set run_dir to the folder of the run that saved the checkpoint"
                )
            return found[-1]

        return Cursor.from_state(on_main(self._ranks, read), self._inputs.prompts.size)
