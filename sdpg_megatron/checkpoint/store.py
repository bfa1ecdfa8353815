"""Checkpoint store of a run: Megatron's distributed format for tensors, and a manifest.

A checkpoint is complete or absent: it is written to a staging folder, flushed, and renamed after its manifest, the last
file, has been written. See docs/checkpoints.md.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from sdpg_megatron.checkpoint.branch import explain_damage
from sdpg_megatron.checkpoint.failures import UNREADABLE, describe
from sdpg_megatron.checkpoint.files import find_damage, fsync_and_hash
from sdpg_megatron.checkpoint.sharded import load_sharded, sharded_state
from sdpg_megatron.checkpoint.state import (
    MANIFEST,
    PARTIAL,
    PREFIX,
    RunState,
    checkpoint_name,
    complete_checkpoints,
    newest_checkpoint,
    step_of,
)
from sdpg_megatron.checkpoint.writing import Writing
from sdpg_megatron.config import CheckpointConfig
from sdpg_megatron.errors import CheckpointError, fix_of, reason_of
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
from sdpg_megatron.observe.files import free_mib, fsync_path, write_atomically

logger = logging.getLogger(__name__)

LATEST = "latest"
"""File with the name of the newest complete checkpoint's folder. For users and scripts; not read here."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint that is being written."""

    state: RunState
    partial: Path
    writing: Writing
    more: Callable[[Path], None] | None


class CheckpointStore:
    """Checkpoints under one folder. All methods are collective; only the main rank renames and deletes."""

    def __init__(self, folder: Path, ranks: ParallelState, config: CheckpointConfig) -> None:
        self._folder = folder
        self._ranks = ranks
        self._config = config
        self._pending: _Pending | None = None

    def newest(self) -> tuple[Path, RunState] | None:
        """Newest checkpoint as the main rank sees it: on network file systems ranks may see different files.

        Raises:
            CheckpointError: its manifest is missing or unreadable; an older checkpoint is not used instead.
        """
        return self._on_main(lambda: newest_checkpoint(self._folder))

    def sweep(self) -> None:
        """Remove unfinished checkpoints of earlier calls. No other process may be writing here."""
        self._on_main(self._sweep)

    def _sweep(self) -> None:
        for path in self._folder.glob(f"{PREFIX}*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._folder.glob(f".{LATEST}.*"):
            path.unlink()
        complete = complete_checkpoints(self._folder)
        if complete:
            self._point_at(complete[-1])
        else:
            (self._folder / LATEST).unlink(missing_ok=True)

    def save(self, policy_trainer: PolicyTrainer, state: RunState, more: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint of this step, and remove those beyond `keep`.

        `more` writes further files into the given folder, on the main rank, after the tensors. With
        `CheckpointConfig.asynchronous` the checkpoint is complete after a later `advance` or `finish`.

        Raises:
            CheckpointError: this or the previous checkpoint could not be written; complete ones are untouched.
        """
        self.finish()
        partial = self._on_main(lambda: self._make_partial(state.step))
        try:
            writing = Writing(sharded_state(policy_trainer), partial, behind=self._config.asynchronous)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._refused(partial, error) from error
        self._pending = _Pending(state, partial, writing, more)
        if not self._config.asynchronous:
            self.finish()

    def advance(self) -> None:
        """Complete the pending checkpoint if all ranks have written their shares; does not wait."""
        self._complete(wait=False)

    def finish(self) -> None:
        """Wait for and complete the pending checkpoint, if there is one. Raises as `save` does."""
        self._complete(wait=True)

    def _complete(self, *, wait: bool) -> None:
        if (pending := self._pending) is None:
            return
        try:
            if not pending.writing.finish(wait=wait):
                return
        except (OSError, RuntimeError, CheckpointException) as error:
            self._pending = None
            raise self._refused(pending.partial, error) from error
        self._pending = None
        sums = {name: one for part in self._ranks.gather_all(pending.writing.sums()) for name, one in part.items()}
        state = dataclasses.replace(pending.state, files=sums)
        self._on_main(lambda: self._put_in_place(pending.partial, state, pending.more))

    def load(self, path: Path, state: RunState, policy_trainer: PolicyTrainer) -> None:
        """Verify a checkpoint's files against its manifest, then load its tensors into the policy trainer.

        The checkpoint may belong to another run or configuration: see `load_sharded`.

        Raises:
            CheckpointError: a file is damaged, or the tensors do not fit the model; on every rank.
        """
        self.check(path, state)
        try:
            load_sharded(path, policy_trainer, state)
        except UNREADABLE as error:
            raise CheckpointError(
                f"{path}: found tensors that do not fit the model ({describe(error)}), expected those of model.path. "
                "Fix: continue with the model and parallel settings of the run"
            ) from error

    def check(self, path: Path, state: RunState) -> None:
        """Verify a checkpoint's files against its manifest; each rank reads its share.

        Raises:
            CheckpointError: names the first damaged file and the alternatives; on every rank.
        """
        names = sorted(state.files)[self._ranks.rank :: self._ranks.world]
        share = {name: state.files[name] for name in names}
        damage = find_damage(path, share, digests=self._config.verify == "digests")
        found = next(filter(None, self._ranks.gather_all(damage)), None)
        if found is not None:
            raise explain_damage(found, path, self._folder)

    # --- on the main rank

    def _make_partial(self, step: int) -> Path:
        """Make a new staging folder, with a random name: writers of a killed run may still be active in theirs."""
        partial = self._folder / f"{checkpoint_name(step)}.{secrets.token_hex(4)}{PARTIAL}"
        new = not self._folder.exists()
        partial.mkdir(parents=True)
        if new:
            fsync_path(self._folder.parent)
        return partial

    def _put_in_place(self, partial: Path, state: RunState, more: Callable[[Path], None] | None = None) -> None:
        try:
            if more is not None:
                more(partial)
            others = (path for path in partial.rglob("*") if path.is_file())
            names = {path.relative_to(partial).as_posix(): path for path in others}
            small = {name: fsync_and_hash(path) for name, path in sorted(names.items()) if name not in state.files}
            dataclasses.replace(state, files={**state.files, **small}).write(partial / MANIFEST)
            target = self._folder / checkpoint_name(state.step)
            self._remove(target)
            partial.rename(target)
            fsync_path(self._folder)
            self._point_at(target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune()

    def _point_at(self, path: Path) -> None:
        write_atomically(self._folder / LATEST, path.name + "\n", durable=True)

    def _prune(self) -> None:
        """Remove old checkpoints after a new one is in place. Failures are logged only."""
        every = self._config.keep_every
        for old in complete_checkpoints(self._folder)[: -self._config.keep]:
            if not every or step_of(old) % every:
                try:
                    self._remove(old)
                except OSError as error:
                    logger.warning("%s: could not be removed: %s", old, reason_of(error))

    def _remove(self, path: Path) -> None:
        """Rename before removal, so that a partly removed folder does not count as a checkpoint."""
        if path.exists():
            staging = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
            path.rename(staging)
            fsync_path(path.parent)  # otherwise a loss of power could restore the old name with fewer files
            shutil.rmtree(staging)

    def _on_main(self, act: Callable[[], T]) -> T:
        """Call `act` on the main rank; all ranks return its result or raise its error, OSError as `CheckpointError`."""

        def attempt() -> T:
            try:
                return act()
            except OSError as error:
                raise self._refused(self._folder, error) from error

        return on_main(self._ranks, attempt)

    def _refused(self, path: Path, error: BaseException) -> CheckpointError:
        if self._ranks.is_main and path.name.endswith(PARTIAL):
            shutil.rmtree(path, ignore_errors=True)
        fix = fix_of(error, path) if isinstance(error, OSError) else "free space on the disk, or check it"
        return CheckpointError(
            f"{path}: could not be written: {describe(error)} ({free_mib(path)} MiB free). "
            f"Earlier checkpoints are untouched. Fix: {fix}; the same command then continues from the newest one"
        )
