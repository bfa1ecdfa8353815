"""Guards of a run: ranks end with their launcher, and a run folder has one writer."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from sdpg_megatron.errors import ConfigError
from sdpg_megatron.observe.files import writing

LOCK_FILE = ".lock"
FIX = "wait for it to end, or use another run_dir"
PATIENCE = 10.0
"""Seconds to wait for a run that is ending."""
_PR_SET_PDEATHSIG = 1


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Have the system kill this rank when torchrun ends, which starts ranks in separate sessions.

    Otherwise they would continue beside the ranks of a restart. Linux only; no effect without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        parent = os.getppid()
        end_with_parent(0 if parent == 1 and not _is_launcher(parent) else parent)


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when `parent`, its parent process, ends; at once if it has ended already.

    Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _is_launcher(process: int) -> bool:
    """True if the process is a launcher. In a container it may be process 1, which also adopts orphans."""
    try:
        return b"torch" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


class RunLock:
    """Exclusive write lock of a run's folder, held until closed or until the process ends in any way."""

    def __init__(self, run_dir: Path, patience: float = PATIENCE) -> None:
        """
        Raises:
            ConfigError: another process holds it for more than `patience` seconds.
            WriteError: the folder or the lock file cannot be written.
        """
        path = run_dir / LOCK_FILE
        with writing(path):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
        deadline = time.monotonic() + patience
        while not _acquired(self._file):
            if time.monotonic() > deadline:
                held = _held(run_dir, self._file)
                self._file.close()
                raise held
            time.sleep(0.05)
        with writing(path):
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def close(self) -> None:
        self._file.close()


def check_unlocked(run_dir: Path) -> None:
    """Check that no run writes to the folder, without writing to it. Raises `ConfigError`."""
    try:
        with (run_dir / LOCK_FILE).open("rb+", buffering=0) as file:
            if not _acquired(file):
                raise _held(run_dir, file)
    except FileNotFoundError:
        return


def _held(run_dir: Path, file: IO[bytes]) -> ConfigError:
    expected = f"a folder that no other run writes to ({_holder(file)} does)"
    return ConfigError("run_dir", str(run_dir), expected, FIX)


def _acquired(file: IO[bytes]) -> bool:
    """Take a record lock: forked checkpoint writers do not inherit it, and network file systems support it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip() or "a process"
