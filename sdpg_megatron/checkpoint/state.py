"""State of a run, besides tensors, that a continued run needs, and the checkpoint folders of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from sdpg_megatron import __version__
from sdpg_megatron.checkpoint.files import FileSum, sha256_of
from sdpg_megatron.errors import CheckpointError, ConfigError, reason_of
from sdpg_megatron.hf_files import HF_ASSETS
from sdpg_megatron.observe.files import write_atomically

CHECKPOINT_FOLDER, CONFIG_FILE = "checkpoints", "config.yaml"
"""In `run_dir`: the checkpoints' folder, and the resolved configuration of the last call."""
MANIFEST = "manifest.json"
FORMAT = 4
"""Version of the manifest."""
PREFIX, PARTIAL = "step_", ".partial"
"""Prefix of a checkpoint's folder; suffix of one that is being written or removed."""

_NAME = re.compile(rf"{PREFIX}\d{{8,}}")
_THREADS = 4


@dataclass(frozen=True, slots=True)
class RecordedChange:
    """A change of the configuration between two calls of a run, or between a branch and its parent."""

    step: int
    """Number of rollout steps done before it took effect."""
    field: str
    """Dotted field name; "prompts" and "reference" for the digests of the data and of the reference model."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.field}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """Checkpoint of another run from which a run started."""

    run: str
    """Absolute path of the other run's folder."""
    step: int

    def __str__(self) -> str:
        return f"{self.run}@{self.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Manifest of a checkpoint.

    It has no generator state: every random draw of a run follows from its seed and the step.
    """

    step: int
    """Number of rollout steps done; also the version of the weights."""
    cursor: Mapping[str, Any]
    """State of the data cursor."""
    seconds: float
    """Training time so far, without setup and evaluation."""
    baseline: Mapping[str, float]
    """Evaluation before the first step."""
    evaluated: bool
    """False if the run stopped before the evaluation that was due after `step`."""
    skipped: int = 0
    """Number of consecutive skipped optimizer steps up to here (non-finite loss or gradient)."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Metrics of `step` if its evaluation is still due: they are recorded together."""
    config: Mapping[str, Any]
    """Resolved configuration of the run."""
    model: str
    """`fingerprint` of the model that the run started from, also its reference."""
    data: str
    """Digest of the training prompts."""
    changes: tuple[RecordedChange, ...] = ()
    """Configuration changes since the first step, including those of ancestors, in order."""
    branches: tuple[BranchPoint, ...] = ()
    """Branch points of the run and its ancestors, oldest first; empty for a run that is not a branch."""
    files: Mapping[str, FileSum] = field(default_factory=dict)
    """Size and digest of every other file of the checkpoint, by name."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that wrote it, by name."""
    format: int = FORMAT
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def setting(self, field: str) -> Any:
        """Value of a configuration field by its dotted name; None if there is no such field."""
        value: Any = self.config
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def write(self, path: Path) -> None:
        """Write the manifest atomically, with digests of the configuration and of itself."""
        fields = dataclasses.asdict(self) | {"config_digest": digest(self.config)}
        write_atomically(path, json.dumps(fields | {"digest": digest(fields)}, indent=1) + "\n", durable=True)

    @classmethod
    def read(cls, path: Path) -> RunState:
        """Read a manifest. Raises `CheckpointError` if it is damaged or of another format."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: found format {fields['format']!r}, expected {FORMAT}. "
                    "Fix: continue with the version of this package that wrote it"
                )
            written = fields.pop("digest")
            if written != digest(fields):
                raise ValueError(f"content that does not match its digest {written!r}")
            if fields.pop("config_digest") != digest(fields["config"]):
                raise ValueError("a configuration that does not match its digest")
            return _STATE.validate_python(fields)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else reason_of(error)
            raise CheckpointError(f"{path}: found {found}, expected a whole manifest") from error


_STATE = TypeAdapter(RunState)


def package_versions() -> dict[str, str]:
    """Versions of the packages that determine a checkpoint's content."""
    return {"sdpg-megatron": __version__, **{name: version(name) for name in ("megatron-core", "torch")}}


def digest(tree: Any) -> str:
    """Digest of a tree of plain data, by its JSON form with sorted keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def checkpoint_folders(folder: Path) -> list[Path]:
    """Folders of checkpoints by name, complete or not, oldest first."""
    found = (path for path in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under a folder, oldest first."""
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]


def newest_checkpoint(folder: Path) -> tuple[Path, RunState] | None:
    """Newest checkpoint under a folder; None if there is none.

    Raises:
        CheckpointError: its manifest is missing or unreadable; an older checkpoint is not used instead.
    """
    found = checkpoint_folders(folder)
    if not found:
        return None
    try:
        return found[-1], RunState.read(found[-1] / MANIFEST)
    except CheckpointError as error:
        raise add_fix(error, found[-1]) from error


def add_fix(damage: CheckpointError, path: Path) -> CheckpointError:
    """Add the checkpoint to continue from instead to an error about `path`, unless it has a fix already."""
    if "Fix: " in str(damage):
        return damage
    older = [other for other in complete_checkpoints(path.parent) if step_of(other) < step_of(path)]
    then = f"continues from {older[-1].name}" if older else "restarts the run: there is no older checkpoint"
    return CheckpointError(f"{damage}. Fix: restore the file, or remove {path}: the same command then {then}")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint, from its folder name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def check_same_model(state: RunState, model: str) -> None:
    """Raise `ConfigError` if `model` is not the fingerprint of the model that the run started from."""
    if model != state.model:
        expected = f"the model that the run was started from ({state.model})"
        raise ConfigError("model.path", model, expected, f"set model.path to that model's folder{_was_at(state)}")


def _was_at(state: RunState) -> str:
    path = state.setting("model.path")
    return "" if path is None else f", which was {path}"


def fingerprint(folder: Path) -> str:
    """Digest of every byte of a Hugging Face folder's configuration, tokenizer and weights."""
    known = {"config.json", *HF_ASSETS}
    paths = sorted(path for path in folder.iterdir() if path.name in known or path.suffix == ".safetensors")
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = list(threads.map(sha256_of, paths))
    return digest({path.name: found for path, found in zip(paths, sums, strict=True)})[:16]
