"""Names in a run's folder, and checks before anything is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from sdpg_megatron.checkpoint.branch import BRANCH_FILE
from sdpg_megatron.checkpoint.state import CHECKPOINT_FOLDER, CONFIG_FILE
from sdpg_megatron.errors import ConfigError, fix_of
from sdpg_megatron.observe.report import CURVE_FILE
from sdpg_megatron.observe.rollout_log import FOLDER as ROLLOUT_FOLDER
from sdpg_megatron.observe.run_log import LOG_FILE
from sdpg_megatron.observe.summary import SUMMARY_FILE
from sdpg_megatron.observe.writers import METRICS_FILE, PROMPTS_FILE, TENSORBOARD_FOLDER
from sdpg_megatron.runtime.run_lock import LOCK_FILE

EXPORT_FOLDER, EVAL_FOLDER, LOG_FOLDER = "model", "eval", "logs"
"""Exported model (in a checkpoint: made by an evaluation); results of each evaluation; logs of servers and ranks."""
CHANGES_FILE = "changes.jsonl"
"""Configuration changes, one a line, as in a checkpoint's manifest."""
FOLDERS = (CHECKPOINT_FOLDER, EXPORT_FOLDER, EVAL_FOLDER, LOG_FOLDER, TENSORBOARD_FOLDER, ROLLOUT_FOLDER)
FILES = (
    *(METRICS_FILE, PROMPTS_FILE, SUMMARY_FILE, CURVE_FILE, LOG_FILE),
    *(CONFIG_FILE, CHANGES_FILE, BRANCH_FILE, LOCK_FILE),
)
EXPECTED = "a folder that a run can write to"


def check_run_dir(run_dir: Path) -> None:
    """Check that a run's folder, and its files and folders, can be made or written. Writes nothing.

    Raises:
        ConfigError: no permission, or a file is found instead of a folder or the reverse.
    """
    check_writable(run_dir, FOLDERS, FILES)


def check_writable(folder: Path, folders: Sequence[str] = (), files: Sequence[str] = ()) -> None:
    """As `check_run_dir`, for any folder and the names in it."""
    try:
        above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _check_access(above, os.W_OK | os.X_OK)
        for name in (*folders, *files):
            path, is_folder = folder / name, name in folders
            if not path.exists():
                continue
            if path.is_dir() != is_folder:
                kind = "file" if is_folder else "folder"
                fix = f"remove or rename the {kind} {path}, or choose another run_dir"
                raise ConfigError("run_dir", f"{folder} (with a {kind} named {name})", EXPECTED, fix)
            _check_access(path, os.W_OK | os.X_OK if is_folder else os.W_OK)
    except OSError as error:
        raise _unusable(folder, error) from error


def make_run_dir(run_dir: Path) -> None:
    """Make a run's folder. Raises `ConfigError`."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(run_dir, error) from error


def _check_access(path: Path, mode: int) -> None:
    if not os.access(path, mode):
        raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)}: {path}")


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError("run_dir", f"{folder} ({error.strerror})", EXPECTED, fix_of(error, folder))
