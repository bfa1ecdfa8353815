"""What a run needs, besides tensors, to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpg_megatron.errors import CheckpointError, ConfigError

FORMAT = 1
FREE_TO_CHANGE = ("run_dir", "parallel", "eval", "checkpoint", "model.path", "data.eval")
"""Fields that may differ between the sessions of one run: they do not change what is learnt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The manifest of a checkpoint.

    No generator state is among it: every random draw of a run follows from its seed and the step.
    """

    step: int
    """Rollout steps done; also the version of the weights."""
    cursor: Mapping[str, Any]
    """Where the data cursor stands."""
    seconds: float
    """Training time so far, without set-up and evaluation."""
    baseline: Mapping[str, float]
    """Evaluation before the first step."""
    config: Mapping[str, Any]
    """The resolved configuration of the run."""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Raises `CheckpointError` where the file is damaged or of another format."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: found format {fields['format']!r}, expected {FORMAT}. "
                    "Fix: continue with the version of this package that wrote it"
                )
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}: found {error}, expected a manifest. Fix: remove it to continue from an older one"
            ) from error


def check_same_run(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to continue a run under a configuration that would make it another run.

    Raises:
        ConfigError: names the first field that differs, with both values.
    """
    old, new = _flatten(saved), _flatten(present)
    for field in sorted(old.keys() | new.keys()):
        free = any(field == name or field.startswith(f"{name}.") for name in FREE_TO_CHANGE)
        if not free and old.get(field) != new.get(field):
            raise ConfigError(
                field, new.get(field), f"{old.get(field)!r}, as the run was started", "restore it, or use a new run_dir"
            )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
