"""What a run needs, besides tensors, to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpg_megatron.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
FORMAT = 1
PREFIX, PARTIAL = "step_", ".partial"
"""Of a checkpoint's folder; of one that is being written."""
FREE_TO_CHANGE = (
    "run_dir", "parallel", "head", "eval", "alarms", "checkpoint", "model.path", "data.eval",
    "rollout.engine", "rollout.sglang", "rollout.batch_size", "rollout.mismatch_limit",
)  # fmt: skip
"""Fields that may differ between the calls that make up one run. The model may have moved, but not changed: see
`RunState.model`. Another engine, or number of data-parallel ranks, draws other samples, from the same distribution."""

_SAMPLE = 4 * 2**20


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
    evaluated: bool
    """False where the run was asked to stop before the evaluation that was due after `step`."""
    config: Mapping[str, Any]
    """The resolved configuration of the run."""
    model: str
    """`fingerprint` of the model that the run started from, which is also the reference."""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write aside, then put in place: a manifest is whole or absent."""
        aside = path.with_name(f".{path.name}")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

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
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: found {error}, expected a manifest. Fix: remove it to continue from an older one"
            ) from error


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under a folder, oldest first."""
    found = (manifest.parent for manifest in folder.glob(f"{PREFIX}*/{MANIFEST}"))
    return sorted(path for path in found if not path.name.endswith(PARTIAL))


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def check_same_model(state: RunState, model: str) -> None:
    """Raises `ConfigError` where `model` is not the fingerprint of the model that the run was started from."""
    if model != state.model:
        expected = f"the model that the run was started from ({state.model})"
        raise ConfigError("model.path", model, expected, "use that one")


def check_same_run(state: RunState, config: Mapping[str, Any], model: str) -> None:
    """Refuse to continue a run under a configuration, or from a model, that would make it another run.

    Raises:
        ConfigError: names the first field that differs, with both values.
    """
    check_same_model(state, model)
    old, new = _flatten(state.config), _flatten(config)
    for field in sorted(old.keys() | new.keys()):
        free = any(field == name or field.startswith(f"{name}.") for name in FREE_TO_CHANGE)
        if not free and old.get(field) != new.get(field):
            raise ConfigError(
                field, new.get(field), f"{old.get(field)!r}, as the run was started", "restore it, or use a new run_dir"
            )


def fingerprint(folder: Path) -> str:
    """Digest of a Hugging Face folder's configuration, tokenizer and weights: of large files, size, head and tail."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
