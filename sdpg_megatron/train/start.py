"""Choose where a call of `train` begins: a new run, a checkpoint of the run, or a branch point of another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdpg_megatron.checkpoint.branch import (
    OPTION,
    BranchRequest,
    BranchStart,
    check_reference,
    checkpoint_of,
    of_other_run,
)
from sdpg_megatron.checkpoint.changes import (
    Change,
    changes_generation,
    check_optimizer_state,
    config_changes,
    end_dependent_schedules,
    refused_changes,
)
from sdpg_megatron.checkpoint.state import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    MANIFEST,
    BranchPoint,
    RecordedChange,
    RunState,
    check_same_model,
    newest_checkpoint,
)
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import CheckpointError, ConfigError
from sdpg_megatron.observe.summary import read_summary


@dataclass(frozen=True, slots=True)
class Start:
    """Starting point of a call; without fields, the first step of a new run."""

    checkpoint: Path | None = None
    state: RunState | None = None
    """Manifest of the checkpoint."""
    changes: tuple[Change, ...] = ()
    """Configuration changes since the checkpoint."""
    recorded: tuple[RecordedChange, ...] = ()
    """All changes since the run's first step, `changes` included."""
    branches: tuple[BranchPoint, ...] = ()
    branch: BranchStart | None = None
    """Set if the checkpoint is another run's."""
    same_data: bool = True
    """True if the checkpoint's data cursor is valid: same prompts in the same order."""
    done: bool = False
    """The run is finished."""

    @property
    def generates_anew(self) -> bool:
        """True if prefetched responses have to be generated again."""
        return changes_generation(self.changes)

    def describe(self, config: RunConfig) -> list[str]:
        """Lines for the user; the first says where the run begins."""
        if self.state is None:
            return ["a new run"]
        if self.done:
            return [f"done already, with {self.state.step} steps"]
        if self.branch is None:
            lines = [f"continuing after step {self.state.step}"]
        else:
            cursor = "its data cursor" if self.same_data else "the data from its beginning"
            reference = "a new reference" if self.branch.new_reference else "its reference"
            lines = [f"a branch of {self.branch.point}, with {cursor} and {reference}"]
        if self.changes:
            lines.append(f"changed since the checkpoint: {'; '.join(map(str, self.changes))}")
        moved = end_dependent_schedules(config)
        if moved and any(change.field == "steps" for change in self.changes):
            end = config.total_optimizer_steps
            lines.append(f"schedules that depend on the run's end, now optimizer step {end}: {', '.join(moved)}")
        return lines


def find_start(config: RunConfig, request: BranchRequest | None, model: Callable[[], str], data: str) -> Start:
    """Find the starting point of a call, and check that its configuration can continue from it. Writes no file.

    Args:
        request: run to branch from, if the user names one.
        model: returns the fingerprint of `config.model.path`; called only if there is a checkpoint.
        data: digest of the prompts.

    Raises:
        ConfigError: the configuration cannot continue the run, or branch from the other; states the fix.
        CheckpointError: the checkpoint's manifest is damaged.
    """
    if request is not None:
        request.check_folder(config.run_dir)
    pinned = BranchStart.read(config.run_dir)
    own = newest_checkpoint(config.run_dir / CHECKPOINT_FOLDER)
    if request is not None:
        _check_same_branch(config.run_dir, request, pinned, started=own is not None)
    if own is not None:
        return _continued(config, *own, model(), data)
    branch = pinned or (BranchStart(request.find(), request.new_reference) if request is not None else None)
    return Start() if branch is None else _branched(config, branch, model(), data)


def _check_same_branch(run_dir: Path, request: BranchRequest, pinned: BranchStart | None, *, started: bool) -> None:
    """Raise `ConfigError` if the folder has another run than the requested branch."""
    fix = f"set run_dir to a new folder, or leave {OPTION} out to continue what is there"
    if pinned is not None:
        if not request.matches(pinned.point) or request.new_reference != pinned.new_reference:
            there = f"{pinned.point}{' with a new reference' if pinned.new_reference else ''}"
            raise ConfigError(OPTION, str(request), f"{there}, which the run in {run_dir} has started from", fix)
    elif started or (run_dir / CONFIG_FILE).exists():
        raise ConfigError("run_dir", f"{run_dir} (another run)", f"a new folder, or a branch of {request.run}", fix)


def _continued(config: RunConfig, path: Path, state: RunState, model: str, data: str) -> Start:
    changes = config_changes(state.config, config.model_dump(mode="json"))
    check_same_model(state, model)
    run, how = config.run_dir, f"{OPTION} {config.run_dir}@{state.step} and a new run_dir"
    if refused := [change for change in changes if change.kind == "data order"]:
        fix = f"restore what cannot change, or branch with {how}"
        raise refused_changes(refused, [change for change in changes if change not in refused], fix)
    check_optimizer_state(state, changes)
    if data != state.data:
        expected = f"the prompts that the run was started with ({state.data}){_data_changes(changes)}"
        raise ConfigError("data", data, expected, f"bring back files and settings, or branch with {how}")
    if config.steps < state.step:
        expected = f"at least {state.step}, which are done"
        fix = f"raise it, or branch from an earlier checkpoint with {OPTION} {run}@STEP"
        raise ConfigError("steps", config.steps, expected, fix)
    done = state.step == config.steps and read_summary(run) is not None
    if done and (learned := [change for change in changes if change.kind != "free"]):
        fix = f"restore them; or raise steps, now {config.steps}, to go on with the change; or branch with {how}"
        raise refused_changes(learned, [change for change in changes if change.kind == "free"], fix)
    recorded = (*state.changes, *(change.recorded(state.step) for change in changes))
    return Start(path, state, tuple(changes), recorded, state.branches, done=done)


def _branched(config: RunConfig, branch: BranchStart, model: str, data: str) -> Start:
    point = branch.point
    BranchRequest(Path(point.run), point.step).find()  # an earlier call found it; it may be gone
    path = checkpoint_of(point)
    try:
        state = RunState.read(path / MANIFEST)
    except CheckpointError as error:
        raise of_other_run(error, path) from error
    if not branch.new_reference:
        check_reference(state, point, model)
    changes = config_changes(state.config, config.model_dump(mode="json"))
    check_optimizer_state(state, changes)
    if config.steps <= point.step:
        fix = "raise it: a branch goes on counting"
        raise ConfigError("steps", config.steps, f"more than the {point.step} steps that {point} has done", fix)
    digests = (Change("prompts", state.data, data), Change("reference", state.model, model))
    moved = [change.recorded(point.step) for change in (*changes, *digests) if change.old != change.new]
    same_data = data == state.data and all(change.kind != "data order" for change in changes)
    branches = (*state.branches, point)
    return Start(path, state, tuple(changes), (*state.changes, *moved), branches, branch, same_data)


def _data_changes(changes: Sequence[Change]) -> str:
    found = [str(change) for change in changes if change.within(("data",))]
    return f"; changed: {'; '.join(found)}" if found else ""
