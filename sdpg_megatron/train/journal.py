"""What a run writes down as it goes, beside its checkpoints: configuration, metrics, prompts, responses."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict

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

PromptFiles = Mapping[str, Sequence[Prompt]]
ProblemFiles = Mapping[str, Sequence[Problem]]


class Journal:
    """The records of a run. Every rank calls every method; the main rank writes.

    Where the disk refuses, all of them but `close` raise `WriteError`, on every rank.
    """

    def __init__(
        self, config: RunConfig, ranks: ParallelState, progress: Progress, step: int, *, evaluated: bool
    ) -> None:
        """Go on after `step`; `evaluated`: with the evaluation that was due after it. Later records are removed."""
        self._ranks = ranks
        self._files: _Files  # on the main rank alone

        def begin() -> None:
            self._files = _Files(config, progress, step, evaluated)

        on_main(ranks, begin)

    def keep_start(self, branch: BranchStart | None, changes: Sequence[RecordedChange]) -> None:
        """Write down where a branch starts, the resolved configuration and all changes of it.

        A run that was finished is so no longer.
        """
        on_main(self._ranks, lambda: self._files.keep_start(branch, changes))

    def keep_prompts(self, step: int, prompts: Sequence[Prompt]) -> None:
        """Write down which prompts a step has learned from."""
        on_main(self._ranks, lambda: self._files.keep_prompts(step, prompts))

    def keep_rollouts(self, step: int, selection: Selection) -> None:
        """Write down responses that a step generated; see `RolloutLogConfig`."""
        on_main(self._ranks, lambda: self._files.keep_rollouts(step, selection))

    def keep_evaluation(self, step: int, asked: PromptFiles, problems: ProblemFiles) -> None:
        """Write down each problem's results after `step`, by data file."""
        on_main(self._ranks, lambda: self._files.keep_evaluation(step, asked, problems))

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write down and show what was measured after `step`, with the alarms that it raises."""
        on_main(self._ranks, lambda: self._files.report(step, numbers))

    def close(self) -> None:
        if self._ranks.is_main:
            self._files.close()


class _Files:
    """The main rank's side."""

    def __init__(self, config: RunConfig, progress: Progress, step: int, evaluated: bool) -> None:
        run_dir = config.run_dir
        self._config, self._progress = config, progress
        truncate_records(run_dir, step, evaluated=evaluated)
        truncate_folders(run_dir / EVAL_FOLDER, step, evaluated=evaluated)
        self._metrics = open_writers(run_dir, [open_external(spec, config) for spec in config.writers])
        self._prompts = JsonlWriter(run_dir / PROMPTS_FILE)
        self._rollouts = RolloutLog(run_dir / ROLLOUT_FOLDER, config.rollout_log)
        records = read_metrics(run_dir / METRICS_FILE)
        self._alarms = Alarms(config.alarms, records)
        progress.recall(records)

    def keep_start(self, branch: BranchStart | None, changes: Sequence[RecordedChange]) -> None:
        run_dir = self._config.run_dir
        if branch is not None:
            branch.write(run_dir)
        write_whole(run_dir / CONFIG_FILE, dump(self._config))
        if changes:
            write_whole(run_dir / CHANGES_FILE, "".join(json.dumps(asdict(change)) + "\n" for change in changes))
        with writing(run_dir / SUMMARY_FILE):
            (run_dir / SUMMARY_FILE).unlink(missing_ok=True)

    def keep_prompts(self, step: int, prompts: Sequence[Prompt]) -> None:
        self._prompts.append(step, {"prompts": [prompt.uid for prompt in prompts]})

    def keep_rollouts(self, step: int, selection: Selection) -> None:
        self._rollouts.write(step, selection.asked, selection.kept)

    def keep_evaluation(self, step: int, asked: PromptFiles, problems: ProblemFiles) -> None:
        config = self._config
        request = Request.of(config, asked, model=f"{config.run_dir}, step {step}", fingerprint=None)
        results = Results.start(config.run_dir / EVAL_FOLDER / f"step_{step:08d}", request)
        for name, found in problems.items():
            results.write(name, found)
        results.finish()
        limit_responses(config.run_dir / EVAL_FOLDER, config.rollout_log.max_mib << 20)

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        found = self._alarms.update(step, numbers)
        self._metrics.write(step, {**numbers, **found.metrics})
        self._progress.step(step, numbers)
        for warning in found.warnings:
            logger.warning("step %d: %s", step, warning)

    def close(self) -> None:
        with ExitStack() as stack:
            for file in (self._metrics, self._prompts):
                stack.callback(file.close)
