"""Branches: start a run from a checkpoint of another run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sdpg_megatron.checkpoint.state import (
    CHECKPOINT_FOLDER,
    BranchPoint,
    RunState,
    add_fix,
    checkpoint_name,
    complete_checkpoints,
    step_of,
)
from sdpg_megatron.config.field_values import Refused, read_path
from sdpg_megatron.errors import CheckpointError, ConfigError
from sdpg_megatron.observe.files import write_whole

BRANCH_FILE = "branch.json"
"""File in a branch's `run_dir` with its branch point, for calls before its first checkpoint."""
OPTION = "--branch-from"


@dataclass(frozen=True, slots=True)
class BranchRequest:
    """Arguments of ``--branch-from`` and ``--new-reference``."""

    run: Path
    step: int | None
    """None for the newest checkpoint."""
    new_reference: bool = False
    """Use the model at `model.path` as the reference instead of the other run's."""

    @classmethod
    def parse(cls, text: str, *, new_reference: bool = False) -> BranchRequest:
        """Read ``RUN`` or ``RUN@STEP``. Raises `ConfigError` if there is no such folder."""
        name, _, number = text.rpartition("@")
        whole = _folder(text)
        if name and number.isascii() and number.isdigit() and not whole.is_dir():
            return cls(_existing(name, text), int(number), new_reference)
        return cls(_existing(text, text), None, new_reference)

    def __str__(self) -> str:
        place = str(self.run) if self.step is None else f"{self.run}@{self.step}"
        return f"{place}{' with a new reference' if self.new_reference else ''}"

    def check_folder(self, run_dir: Path) -> None:
        """Raise `ConfigError` if the branch would write into the other run's folder."""
        here = run_dir.resolve()
        if self.run == here or self.run in here.parents:
            expected = f"a folder outside of {self.run}, the run that is branched from"
            raise ConfigError("run_dir", str(run_dir), expected, "set run_dir to a new folder")

    def find(self) -> BranchPoint:
        """Find the requested checkpoint. Raises `ConfigError` if the run does not have it."""
        steps = [step_of(path) for path in complete_checkpoints(self.run / CHECKPOINT_FOLDER)]
        if not steps:
            expected = "a run that has a complete checkpoint"
            raise ConfigError(OPTION, str(self.run), expected, "name another run, or let that one save first")
        if self.step is not None and self.step not in steps:
            expected = f"one of its checkpoints: {', '.join(f'@{step}' for step in steps)}"
            fix = "name one of these; checkpoint.keep and checkpoint.keep_every of that run decide which stay"
            raise ConfigError(OPTION, f"{self.run}@{self.step}", expected, fix)
        return BranchPoint(str(self.run), steps[-1] if self.step is None else self.step)

    def matches(self, point: BranchPoint) -> bool:
        """True if a branch that started at `point` satisfies the request."""
        return Path(point.run) == self.run and self.step in (None, point.step)


@dataclass(frozen=True, slots=True)
class BranchStart:
    """Branch point of a run, written before its first step."""

    point: BranchPoint
    new_reference: bool

    def write(self, run_dir: Path) -> None:
        """Write the branch point to `run_dir`. Raises `WriteError`."""
        fields = {**asdict(self.point), "new_reference": self.new_reference}
        write_whole(run_dir / BRANCH_FILE, json.dumps(fields) + "\n")

    @classmethod
    def read(cls, run_dir: Path) -> BranchStart | None:
        """Read a branch point; None if the folder is not a branch. Raises `CheckpointError` if the file is damaged."""
        path = run_dir / BRANCH_FILE
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(BranchPoint(str(fields["run"]), int(fields["step"])), bool(fields["new_reference"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: found {error!r}, expected a branch point. Fix: remove run_dir, and branch again"
            ) from error


def checkpoint_of(point: BranchPoint) -> Path:
    """Folder of the checkpoint at a branch point."""
    return Path(point.run) / CHECKPOINT_FOLDER / checkpoint_name(point.step)


def check_reference(state: RunState, point: BranchPoint, model: str) -> None:
    """Raise `ConfigError` if `model` is not the fingerprint of the other run's reference."""
    if model != state.model:
        expected = f"the model that {point.run} was started from ({state.model}), which is the reference"
        path = state.setting("model.path")
        fix = (
            f"set model.path to it{'' if path is None else f' (it was {path})'}, or add --new-reference to take another"
        )
        raise ConfigError("model.path", model, expected, fix)


def of_other_run(damage: CheckpointError, path: Path) -> CheckpointError:
    """Add the other possible branch points to an error about a branch point's checkpoint; see `add_fix`."""
    if "Fix: " in str(damage):
        return damage
    others = [f"@{step_of(other)}" for other in complete_checkpoints(path.parent) if other != path]
    choice = f"branch from another of its checkpoints ({', '.join(others)})" if others else "branch from another run"
    return CheckpointError(f"{damage}. Fix: restore the file, or {choice}")


def explain_damage(damage: CheckpointError, path: Path, own: Path) -> CheckpointError:
    """Add the fix to an error about a damaged checkpoint. `own`: checkpoint folder of the run that reads it."""
    return add_fix(damage, path) if path.parent == own else of_other_run(damage, path)


def _folder(text: str) -> Path:
    path = read_path(text)
    if isinstance(path, Refused):
        raise ConfigError(OPTION, text, path.expected or "the folder of a run", path.fix)
    found: Path = path.resolve()
    return found


def _existing(name: str, text: str) -> Path:
    folder = _folder(name)
    if not folder.is_dir():
        missing = next(part for part in (*reversed(folder.parents), folder) if not part.is_dir())
        fix = f"check the path: there is no folder {missing.name} in {missing.parent}"
        raise ConfigError(OPTION, text, "the folder of a run, or RUN@STEP", fix)
    return folder
