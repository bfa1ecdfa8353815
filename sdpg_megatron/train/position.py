"""Where a run stands: what changes from step to step, besides the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdpg_megatron.checkpoint.state import RunState
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor


@dataclass(slots=True)
class Position:
    """See `RunState` for what the fields mean."""

    cursor: Cursor
    step: int = 0
    seconds: float = 0.0
    baseline: Mapping[str, float] = field(default_factory=dict)
    evaluated: bool = False
    skipped: int = 0
    saved: int | None = None
    """The step of the newest checkpoint, complete or being written."""

    @classmethod
    def first(cls, config: RunConfig, prompts: int | None) -> Position:
        """Of a new run on so many prompts; None for an endless source."""
        return cls(Cursor(prompts, config.seed, config.data.shuffle))

    @classmethod
    def of(cls, state: RunState, prompts: int | None) -> Position:
        """Of a run that goes on from a checkpoint."""
        cursor = Cursor.from_state(state.cursor, prompts)
        return cls(cursor, state.step, state.seconds, state.baseline, state.evaluated, state.skipped, saved=state.step)

    def state(self, config: RunConfig, model: str) -> RunState:
        """For a checkpoint; `model` is the fingerprint of the model that the run started from."""
        return RunState(
            step=self.step,
            cursor=self.cursor.state(),
            seconds=self.seconds,
            baseline=self.baseline,
            evaluated=self.evaluated,
            skipped=self.skipped,
            config=config.model_dump(mode="json"),
            model=model,
        )
