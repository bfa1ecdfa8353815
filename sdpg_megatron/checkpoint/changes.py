"""Configuration changes between the calls of a run, and between a branch and the run it starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from sdpg_megatron.checkpoint.state import RecordedChange, RunState
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import flatten
from sdpg_megatron.errors import ConfigError

FREE = (
    "run_dir", "parallel", "head", "eval", "rollout_log", "alarms", "checkpoint", "watchdog", "writers",
    "data.eval", "data.train",
    "model.path", "model.spec", "model.packed", "model.recompute", "model.gradient_accumulation_fusion",
    "model.activation_fusion",
    "reward.workers", "reward.timeout",
    "optimizer.micro_batch_size", "optimizer.micro_batch_tokens",
    "rollout.engine", "rollout.sglang", "rollout.batch_size", "rollout.mismatch_limit",
    "optimizer.overlap_grad_reduce", "optimizer.overlap_param_gather", "optimizer.bucket_size",
    "optimizer.skip_limit", "reward.failure_limit",
)  # fmt: skip
"""Fields that do not change training. Models and data may move: their contents are compared by digest. Another engine
or number of data-parallel ranks draws other samples from the same distribution."""
DATA_ORDER = ("seed", "data.shuffle", "data.reasoning_gym")
"""Fields that, with the data, determine the prompts of a step. Fixed in a run; a branch that changes them restarts the
data."""
OPTIMIZER_STATE = ("optimizer.distributed",)
"""Fields that determine the format of the saved optimizer state."""
GENERATION = ("rollout", "reward")
"""Sections that determine responses and rewards, apart from the fields in `FREE`."""

RENAMED = {"rollout.sglang.sink": "rollout.sglang.transport"}
"""New names of fields; checkpoints of version 0.1 record the old ones."""

REMOVED = (("objective.contrast", 0.0),)
"""Fields of version 0.1 with the value that had no effect."""

Kind = Literal["free", "learning", "data order", "optimizer state"]


@dataclass(frozen=True, slots=True)
class Change:
    """A configuration field with another value than before."""

    field: str
    old: Any
    new: Any

    @property
    def kind(self) -> Kind:
        """Category of the field; "learning" for fields in none of the lists above."""
        kinds: tuple[tuple[Kind, Sequence[str]], ...] = (
            ("free", FREE),
            ("data order", DATA_ORDER),
            ("optimizer state", OPTIMIZER_STATE),
        )
        return next((kind for kind, fields in kinds if self.within(fields)), "learning")

    def within(self, fields: Sequence[str]) -> bool:
        """True if the field is one of `fields`, or below one of them."""
        return any(self.field == name or self.field.startswith(f"{name}.") for name in fields)

    def recorded(self, step: int) -> RecordedChange:
        """Record the change for a run that has done `step` steps."""
        return RecordedChange(step, self.field, self.old, self.new)

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} -> {self.new!r}"


def refused_changes(refused: Sequence[Change], others: Sequence[Change], fix: str) -> ConfigError:
    """Error that lists the refused changes with old and new values, and the changes that are allowed."""
    lines = [f"{c.field}: found {c.new!r}, expected {c.old!r}, as the run was started" for c in refused]
    if others:
        lines.append(f"may change: {'; '.join(map(str, others))}")
    return ConfigError.of_text(refused[0].field, "\n  ".join([*lines, f"Fix: {fix}"]))


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Fields with different values, sorted by name, without `run_dir`.

    Fields that the old configuration lacks count as having had their default.
    """
    before, after = {RENAMED.get(name, name): value for name, value in flatten(old).items()}, flatten(new)
    before |= {name: _default(name) for name in after.keys() - before.keys()}
    before = {name: value for name, value in before.items() if (name, value) not in REMOVED}
    changes = (Change(name, before[name], after.get(name)) for name in sorted(before) if name != "run_dir")
    return [change for change in changes if change.old != change.new]


def check_optimizer_state(state: RunState, changes: Sequence[Change]) -> None:
    """Raise `ConfigError` if the checkpoint's optimizer state cannot be read under the new configuration."""
    refused = [change for change in changes if change.kind == "optimizer state"]
    if not state.setting("optimizer.distributed"):  # Megatron's other optimizers depend on the model's dtype
        refused += [change for change in changes if change.field == "model.dtype"]
    if refused:
        fix = "restore it; or start a run from the exported model, without the optimizer's state"
        raise refused_changes(refused, [change for change in changes if change not in refused], fix)


def changes_generation(changes: Sequence[Change]) -> bool:
    """True if the new configuration would generate other responses than the prefetched ones."""
    return any(change.kind == "learning" and change.within(GENERATION) for change in changes)


def end_dependent_schedules(config: RunConfig) -> list[str]:
    """Fields with a schedule that depends on the last step, so that another `steps` changes it."""
    objective, optimizer = config.objective, config.optimizer
    fields = ["optimizer.schedule"] if optimizer.schedule != "constant" else []
    if objective.beta:
        fields += ["objective.beta_warmup_steps"] if objective.beta_warmup_steps is None else []
        fields += ["objective.beta_decay_steps"] if objective.beta_decay_steps != 0 else []
    return fields


def _default(field: str) -> Any:
    """Default of a field in JSON form; None for required fields and entries of a table."""
    kind: Any = RunConfig
    value: Any = None
    for name in field.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or name not in kind.model_fields:
            return None
        value = kind.model_fields[name].get_default(call_default_factory=False)
        kind = kind.model_fields[name].annotation
    return None if value is PydanticUndefined else to_jsonable_python(value)
