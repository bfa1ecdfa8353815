"""Records of a run besides its checkpoints: configuration, metrics, prompts, responses, evaluations."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial, wraps
from typing import Concatenate, ParamSpec

from sdpg_megatron.checkpoint.branch import BranchStart
from sdpg_megatron.checkpoint.state import CONFIG_FILE, RecordedChange
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import dump
from sdpg_megatron.evaluation.problems import Problem
from sdpg_megatron.evaluation.results import Request, Results, limit_responses
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.observe.alarms import Alarms
from sdpg_megatron.observe.files import write_whole, writing
from sdpg_megatron.observe.progress import Progress
from sdpg_megatron.observe.rollout_log import FOLDER as ROLLOUT_FOLDER
from sdpg_megatron.observe.rollout_log import RolloutLog
from sdpg_megatron.observe.summary import SUMMARY_FILE
from sdpg_megatron.observe.truncate import truncate_folders
from sdpg_megatron.observe.writers import (
    METRICS_FILE,
    PROMPTS_FILE,
    JsonlWriter,
    open_external,
    open_writers,
    read_metrics,
    truncate_records,
)
from sdpg_megatron.records import Prompt
from sdpg_megatron.train.run_dir import CHANGES_FILE, EVAL_FOLDER
from sdpg_megatron.train.selection import Selection

logger = logging.getLogger(__name__)

P = ParamSpec("P")
PromptFiles = Mapping[str, Sequence[Prompt]]
ProblemFiles = Mapping[str, Sequence[Problem]]


def _on_main_rank(method: Callable[Concatenate[Journal, P], None]) -> Callable[Concatenate[Journal, P], None]:
    """Call a method on the main rank alone; every rank raises its `SdpgError`."""

    @wraps(method)
    def call(journal: Journal, *args: P.args, **kwargs: P.kwargs) -> None:
        on_main(journal.ranks, partial(method, journal, *args, **kwargs))

    return call


class Journal:
    """Records of a run. Every rank calls every method; the main rank writes.

    All methods but `close` raise `WriteError` on every rank if a file cannot be written.
    """

    def __init__(
        self, config: RunConfig, ranks: ParallelState, progress: Progress, step: int, *, evaluated: bool
    ) -> None:
        """Continue after `step`, removing later records.

        Args:
            evaluated: True to keep the records of the evaluation after `step`.
        """
        self.ranks, self._config, self._progress = ranks, config, progress
        self._open(step, evaluated)

    @_on_main_rank
    def _open(self, step: int, evaluated: bool) -> None:
        run_dir = self._config.run_dir
        truncate_records(run_dir, step, evaluated=evaluated)
        truncate_folders(run_dir / EVAL_FOLDER, step, evaluated=evaluated)
        self._metrics = open_writers(run_dir, [open_external(spec, self._config) for spec in self._config.writers])
        self._prompts = JsonlWriter(run_dir / PROMPTS_FILE)
        self._rollouts = RolloutLog(run_dir / ROLLOUT_FOLDER, self._config.rollout_log)
        records = read_metrics(run_dir / METRICS_FILE)
        self._alarms = Alarms(self._config.alarms, records)
        self._progress.recall(records)

    @_on_main_rank
    def write_start(self, branch: BranchStart | None, changes: Sequence[RecordedChange]) -> None:
        """Write the branch point, the resolved configuration and all its changes; unmark a finished run."""
        run_dir = self._config.run_dir
        if branch is not None:
            branch.write(run_dir)
        write_whole(run_dir / CONFIG_FILE, dump(self._config))
        if changes:
            write_whole(run_dir / CHANGES_FILE, "".join(json.dumps(asdict(change)) + "\n" for change in changes))
        with writing(run_dir / SUMMARY_FILE):
            (run_dir / SUMMARY_FILE).unlink(missing_ok=True)

    @_on_main_rank
    def write_prompts(self, step: int, prompts: Sequence[Prompt]) -> None:
        """Write the names of the prompts that a step trained on."""
        self._prompts.append(step, {"prompts": [prompt.uid for prompt in prompts]})

    @_on_main_rank
    def write_rollouts(self, step: int, selection: Selection) -> None:
        """Write responses that a step generated; see `RolloutLogConfig`."""
        self._rollouts.write(step, selection.generated, selection.kept)

    @_on_main_rank
    def write_evaluation(self, step: int, prompts: PromptFiles, problems: ProblemFiles) -> None:
        """Write each problem's results after `step`, by data file."""
        config = self._config
        request = Request.of(config, prompts, model=f"{config.run_dir}, step {step}", fingerprint=None)
        results = Results.start(config.run_dir / EVAL_FOLDER / f"step_{step:08d}", request)
        for name, found in problems.items():
            results.write(name, found)
        results.finish()
        limit_responses(config.run_dir / EVAL_FOLDER, config.rollout_log.max_mib << 20)

    @_on_main_rank
    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write and show the metrics after `step`, with the alarms that they raise."""
        found = self._alarms.update(step, numbers)
        self._metrics.write(step, {**numbers, **found.metrics})
        self._progress.step(step, numbers)
        for warning in found.warnings:
            logger.warning("step %d: %s", step, warning)

    def close(self) -> None:
        if self.ranks.is_main:
            with ExitStack() as stack:
                for file in (self._metrics, self._prompts):
                    stack.callback(file.close)
