"""What may differ between the calls that make up one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from sdpg_megatron.checkpoint.state import RunState, check_same_model
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.settings import flatten

FREE_TO_CHANGE = (
    "run_dir", "parallel", "head", "eval", "rollout_log", "alarms", "checkpoint", "watchdog", "data.eval",
    "model.path", "model.spec", "model.packed", "model.recompute",
    "optimizer.micro_batch_size", "optimizer.micro_batch_tokens",
    "rollout.engine", "rollout.sglang", "rollout.batch_size", "rollout.mismatch_limit",
    "optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather", "optimizer.bucket_size",
    "optimizer.skip_limit", "reward.failure_limit",
)  # fmt: skip
"""Fields that may differ. The model may have moved, but not changed: see `RunState.model`. Another engine, or number of
data-parallel ranks, draws other samples, from the same distribution."""


@dataclass(frozen=True, slots=True)
class Change:
    """A field of the configuration that is not what it was."""

    field: str
    old: Any
    new: Any

    @property
    def allowed(self) -> bool:
        return any(self.field == name or self.field.startswith(f"{name}.") for name in FREE_TO_CHANGE)

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} -> {self.new!r}"


class ChangedRunError(ConfigError):
    """A configuration that would make a run another run: shows all that differs, with old and new values."""

    def __init__(self, changes: list[Change]) -> None:
        refused = [change for change in changes if not change.allowed]
        lines = [f"{c.field}: found {c.new!r}, expected {c.old!r}, as the run was started" for c in refused]
        if free := [str(change) for change in changes if change.allowed]:
            lines.append(f"free to change: {'; '.join(free)}")
        fix = "Fix: restore what is not free to change, or use a new run_dir"
        super(ConfigError, self).__init__("\n  ".join([*lines, fix]))
        self.field = refused[0].field


def check_same_run(state: RunState, config: Mapping[str, Any], model: str, data: str) -> list[Change]:
    """What differs from the configuration that a checkpoint was written under; all of it is free to change.

    Raises:
        ConfigError: the run would be another one, by its model, its configuration or its prompts.
    """
    check_same_model(state, model)
    changes = config_changes(state.config, config)
    if not all(change.allowed for change in changes):
        raise ChangedRunError(changes)
    if data != state.data:
        expected = f"the prompts that the run was started with ({state.data})"
        raise ConfigError("data", data, expected, "bring the files back as they were, or use a new run_dir")
    return changes


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Fields with different values, in order of their names. A field that is new to the package had its default."""
    before, after = flatten(old), flatten(new)
    before |= {name: _default(name) for name in after.keys() - before.keys()}
    changes = (Change(name, before[name], after.get(name)) for name in sorted(before))
    return [change for change in changes if change.old != change.new]


def _default(field: str) -> Any:
    """As JSON has it; None for a field that needs a value, and for an entry of a table."""
    kind: Any = RunConfig
    value: Any = None
    for name in field.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or name not in kind.model_fields:
            return None
        value = kind.model_fields[name].get_default(call_default_factory=False)
        kind = kind.model_fields[name].annotation
    return None if value is PydanticUndefined else to_jsonable_python(value)
