"""What a run needs, besides tensors, to go on as if it had never stopped."""

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
from sdpg_megatron.checkpoint.files import FileSum, sha256_of, write_durably
from sdpg_megatron.errors import CheckpointError, ConfigError, reason_of
from sdpg_megatron.hf_files import HF_ASSETS

CHECKPOINT_FOLDER, CONFIG_FILE = "checkpoints", "config.yaml"
"""In a run's `run_dir`: its checkpoints, and the resolved configuration of its last call."""
MANIFEST = "manifest.json"
FORMAT = 4
"""Of the manifest and what it promises."""
PREFIX, PARTIAL = "step_", ".partial"
"""Of a checkpoint's folder; of one that is being written, or removed."""

_NAME = re.compile(rf"{PREFIX}\d{{8,}}")
_THREADS = 4


@dataclass(frozen=True, slots=True)
class RecordedChange:
    """A change of the configuration between two calls of a run, or between a branch and its parent."""

    step: int
    """Rollout steps done before it took effect."""
    field: str
    """Dotted name; "prompts" and "reference" for the digests of data and of the reference model."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.field}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """A checkpoint of another run that a run has started from."""

    run: str
    """Absolute path of the other run's folder."""
    step: int

    def __str__(self) -> str:
        return f"{self.run}@{self.step}"


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
    skipped: int = 0
    """Optimizer steps that were skipped in a row, up to here, as loss or gradient was not finite."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Of `step`, where its evaluation is to be made yet: their record is written with that."""
    config: Mapping[str, Any]
    """The resolved configuration of the run."""
    model: str
    """`fingerprint` of the model that the run started from, which is also the reference."""
    data: str
    """Digest of the prompts that the run learns from."""
    changes: tuple[RecordedChange, ...] = ()
    """Configuration changes since the first step, those of ancestors included, in order."""
    branches: tuple[BranchPoint, ...] = ()
    """Branch points of the run and its ancestors, oldest first; empty for a run that is no branch."""
    files: Mapping[str, FileSum] = field(default_factory=dict)
    """Every other file of the checkpoint, by its name."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that wrote it, by their names."""
    format: int = FORMAT
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def setting(self, field: str) -> Any:
        """A field of the configuration by its dotted name; None where it has no such field."""
        value: Any = self.config
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def write(self, path: Path) -> None:
        """Write a manifest that is whole or absent, with digests of the configuration and of itself."""
        fields = dataclasses.asdict(self) | {"config_digest": digest(self.config)}
        write_durably(path, json.dumps(fields | {"digest": digest(fields)}, indent=1) + "\n")

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
            written = fields.pop("digest")
            if written != digest(fields):
                raise ValueError(f"content that is not what its digest {written!r} was made of")
            if fields.pop("config_digest") != digest(fields["config"]):
                raise ValueError("a configuration that is not what its digest was made of")
            return _STATE.validate_python(fields)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else reason_of(error)
            raise CheckpointError(f"{path}: found {found}, expected a whole manifest") from error


_STATE = TypeAdapter(RunState)


def package_versions() -> dict[str, str]:
    """Of those whose work a checkpoint is."""
    return {"sdpg-megatron": __version__, **{name: version(name) for name in ("megatron-core", "torch")}}


def digest(tree: Any) -> str:
    """Of what JSON makes of a tree of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def checkpoint_folders(folder: Path) -> list[Path]:
    """What should be complete checkpoints, oldest first."""
    found = (path for path in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under a folder, oldest first."""
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]


def newest_checkpoint(folder: Path) -> tuple[Path, RunState] | None:
    """The newest checkpoint under a folder; None where there is none.

    Raises:
        CheckpointError: it has no manifest, or one that cannot be read; older ones are not taken in its place.
    """
    found = checkpoint_folders(folder)
    if not found:
        return None
    try:
        return found[-1], RunState.read(found[-1] / MANIFEST)
    except CheckpointError as error:
        raise with_way_out(error, found[-1]) from error


def with_way_out(damage: CheckpointError, path: Path) -> CheckpointError:
    """An error about a checkpoint, with what a run can continue from instead; as it is where it says what to do."""
    if "Fix: " in str(damage):
        return damage
    older = [other for other in complete_checkpoints(path.parent) if step_of(other) < step_of(path)]
    then = f"continues from {older[-1].name}" if older else "starts the run again: there is no older one"
    return CheckpointError(f"{damage}. Fix: bring the file back, or remove {path}: the same command then {then}")


def checkpoint_name(step: int) -> str:
    """Of the folder of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def check_same_model(state: RunState, model: str) -> None:
    """Raises `ConfigError` where `model` is not the fingerprint of the model that the run was started from."""
    if model != state.model:
        expected = f"the model that the run was started from ({state.model})"
        raise ConfigError("model.path", model, expected, f"set model.path to that model's folder{_was_at(state)}")


def _was_at(state: RunState) -> str:
    path = state.setting("model.path")
    return "" if path is None else f", which was {path}"


def fingerprint(folder: Path) -> str:
    """Digest of a Hugging Face folder: of its configuration, tokenizer and weights, every byte of them."""
    known = {"config.json", *HF_ASSETS}
    paths = sorted(path for path in folder.iterdir() if path.name in known or path.suffix == ".safetensors")
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = list(threads.map(sha256_of, paths))
    return digest({path.name: found for path, found in zip(paths, sums, strict=True)})[:16]
