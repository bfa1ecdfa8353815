"""Training state besides the weights: step, data cursor, metrics and prefetched rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdpg_megatron.checkpoint.prefetched_rollouts import (
    PREFETCHED,
    PrefetchedRollouts,
    read_prefetched,
    write_prefetched,
)
from sdpg_megatron.checkpoint.state import BranchPoint, RecordedChange, RunState, package_versions
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.rewards.failures import exceeds
from sdpg_megatron.train.run_fingerprint import RunFingerprint
from sdpg_megatron.train.start import Start


@dataclass(slots=True)
class TrainState:
    """Fields as in `RunState`."""

    cursor: Cursor
    step: int = 0
    seconds: float = 0.0
    baseline: Mapping[str, float] = field(default_factory=dict)
    evaluated: bool = False
    skipped: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)
    saved: int | None = None
    """The step of the newest checkpoint, complete or being written."""
    prefetched: PrefetchedRollouts | None = None
    """First round of the next step, if generated ahead of it."""
    changes: tuple[RecordedChange, ...] = ()
    branches: tuple[BranchPoint, ...] = ()

    @classmethod
    def first(cls, config: RunConfig, prompts: int | None) -> TrainState:
        """State of a new run on `prompts` prompts; None for an endless source."""
        return cls(Cursor(prompts, config.seed, config.data.shuffle))

    @classmethod
    def of(cls, start: Start, config: RunConfig, prompts: PromptSource) -> TrainState:
        """State at the start of a call. Raises `CheckpointError`."""
        saved, folder = start.state, start.checkpoint
        if saved is None or folder is None:
            return cls.first(config, prompts.size)
        if not start.same_data:
            state = cls.first(config, prompts.size)
        else:
            prefetched = read_prefetched(folder / PREFETCHED, prompts) if PREFETCHED in saved.files else None
            # the failing verifier may have been replaced since
            if prefetched is not None and (
                start.generates_anew or exceeds(prefetched.groups, config.reward.failure_limit)
            ):
                prefetched = PrefetchedRollouts(prefetched.indices, ())
            state = cls(Cursor.from_state(saved.cursor, prompts.size), prefetched=prefetched)
        state.step, state.changes, state.branches = saved.step, start.recorded, start.branches
        if start.branch is None:
            state.seconds, state.baseline, state.evaluated = saved.seconds, saved.baseline, saved.evaluated
            state.skipped, state.measured, state.saved = saved.skipped, saved.measured, saved.step
        return state

    def prefetched_writer(self) -> Callable[[Path], None] | None:
        """Function that writes the prefetched rollouts into a checkpoint's folder; None without any."""
        prefetched = self.prefetched
        return None if prefetched is None else lambda folder: write_prefetched(folder / PREFETCHED, prefetched)

    def saved_state(self, config: RunConfig, fingerprint: RunFingerprint) -> RunState:
        """The part that a checkpoint's manifest records."""
        return RunState(
            step=self.step,
            cursor=self.cursor.state(),
            seconds=self.seconds,
            baseline=self.baseline,
            evaluated=self.evaluated,
            skipped=self.skipped,
            measured=self.measured,
            config=config.model_dump(mode="json"),
            model=fingerprint.model,
            data=fingerprint.data,
            changes=self.changes,
            branches=self.branches,
            versions=package_versions(),
        )
