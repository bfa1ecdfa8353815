"""Where a run stands: what changes from step to step, besides the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdpg_megatron.checkpoint.prefetched_rollouts import DRAWN, Drawn, read_drawn, write_drawn
from sdpg_megatron.checkpoint.state import BranchPoint, RecordedChange, RunState, package_versions
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.rewards.failures import exceeds
from sdpg_megatron.train.run_fingerprint import Origin
from sdpg_megatron.train.start import Start


@dataclass(slots=True)
class Position:
    """See `RunState` for what the fields mean."""

    cursor: Cursor
    step: int = 0
    seconds: float = 0.0
    baseline: Mapping[str, float] = field(default_factory=dict)
    evaluated: bool = False
    skipped: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)
    saved: int | None = None
    """The step of the newest checkpoint, complete or being written."""
    drawn: Drawn | None = None
    """The first round of the next step, where that was generated ahead of it."""
    changes: tuple[RecordedChange, ...] = ()
    branches: tuple[BranchPoint, ...] = ()

    @classmethod
    def first(cls, config: RunConfig, prompts: int | None) -> Position:
        """Of a new run on so many prompts; None for an endless source."""
        return cls(Cursor(prompts, config.seed, config.data.shuffle))

    @classmethod
    def of(cls, start: Start, config: RunConfig, prompts: PromptSource) -> Position:
        """Position at which a call begins. Raises `CheckpointError`."""
        state, folder = start.state, start.checkpoint
        if state is None or folder is None:
            return cls.first(config, prompts.size)
        if not start.same_data:
            position = cls.first(config, prompts.size)
        else:
            drawn = read_drawn(folder / DRAWN, prompts) if DRAWN in state.files else None
            # the verifier that failed may be another one now
            if drawn is not None and (start.generates_anew or exceeds(drawn.groups, config.reward.failure_limit)):
                drawn = Drawn(drawn.indices, ())
            position = cls(Cursor.from_state(state.cursor, prompts.size), drawn=drawn)
        position.step, position.changes, position.branches = state.step, start.recorded, start.branches
        if start.branch is None:
            position.seconds, position.baseline, position.evaluated = state.seconds, state.baseline, state.evaluated
            position.skipped, position.measured, position.saved = state.skipped, state.measured, state.step
        return position

    def more(self) -> Callable[[Path], None] | None:
        """What writes that of it which is not in the manifest into a checkpoint's folder, if there is any."""
        drawn = self.drawn
        return None if drawn is None else lambda folder: write_drawn(folder / DRAWN, drawn)

    def state(self, config: RunConfig, origin: Origin) -> RunState:
        """For a checkpoint."""
        return RunState(
            step=self.step,
            cursor=self.cursor.state(),
            seconds=self.seconds,
            baseline=self.baseline,
            evaluated=self.evaluated,
            skipped=self.skipped,
            measured=self.measured,
            config=config.model_dump(mode="json"),
            model=origin.model,
            data=origin.data,
            changes=self.changes,
            branches=self.branches,
            versions=package_versions(),
        )
