"""Runs one command, copies its output without secrets, and ends it with all its descendants.

It ends the command on request, or when the parent is gone, even if killed. Run by path, with the standard library only:

    python -I process_guard.py <job

Standard input is one line of JSON (see `Job`), then, to end the command, one line with its grace period in seconds. End
of input means that the parent is gone. Linux only: it adopts orphans (prctl) and reads /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn, TypedDict

LOOK = 0.2
"""Seconds between checks of the command and the parent."""
ORPHAN_GRACE = 5.0
"""Grace period when the parent is gone, in seconds."""
SETTLE = 2.0
"""Seconds for the command's descendants to end by themselves: helpers of Python and torch remove shared memory and
semaphores once all other processes are gone."""
KILL_LIMIT = 10.0
"""Seconds for killed processes to end; one that hangs in a device driver is left behind."""
PR_SET_CHILD_SUBREAPER = 36


class Job(TypedDict):
    """Command to run."""

    command: list[str]
    parent: int
    """Process id of the guard's parent."""
    input: str
    """The command's standard input."""
    secrets: list[str]
    """Strings to remove from the output."""


def main() -> int:
    """Run the job; return the command's exit status, or 128 + the signal that ended it."""
    signal.signal(signal.SIGTERM, _exit)
    _adopt_orphans()
    with open(0, "rb", buffering=0, closefd=False) as orders:
        line = orders.readline()
        if not line:
            return 1  # the parent is gone already
        job: Job = json.loads(line)
        child = subprocess.Popen(
            job["command"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert child.stdin is not None and child.stdout is not None
        copier = threading.Thread(target=copy, args=(child.stdout, 1, spellings(job["secrets"])), daemon=True)
        copier.start()
        grace = 0.0
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(job["input"].encode())
            grace = _wait(child, orders, job["parent"])
        finally:
            code = _end(child, grace)
            copier.join(timeout=KILL_LIMIT)
    return code if code >= 0 else 128 - code


def _exit(_signal: int, _frame: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _wait(child: subprocess.Popen[bytes], orders: IO[bytes], parent: int) -> float:
    """Wait until the command ends, a stop request arrives, or the parent is gone; return the grace period.

    The parent's process is checked too, as a forked child of it may hold the input's other end open.
    """
    while child.poll() is None:
        if os.getppid() != parent:
            return ORPHAN_GRACE
        if select.select([orders], [], [], LOOK)[0]:
            line = orders.readline()
            return float(line) if line else ORPHAN_GRACE
    return 0.0


def _end(child: subprocess.Popen[bytes], grace: float) -> int:
    """End the command and its descendants; return its exit code as subprocess does.

    SIGTERM goes to the command alone, which ends its processes in the right order.
    """
    if child.poll() is None and grace > 0:
        child.terminate()
        child.send_signal(signal.SIGCONT)  # a stopped process takes no other signal
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(KILL_LIMIT)
    _until_no_children(signal.SIGCONT, SETTLE)
    _until_no_children(signal.SIGKILL, KILL_LIMIT)
    return -signal.SIGKILL if child.returncode is None else child.returncode


def _until_no_children(number: signal.Signals, limit: float) -> None:
    """Send a signal to all children repeatedly until none is left or the time is up."""
    deadline = time.monotonic() + limit
    while (left := children()) and time.monotonic() < deadline:
        for pid in left:
            os.kill(pid, number)  # orphans become children of this process, and get it in the next round
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def children() -> list[int]:
    """Child processes, including adopted orphans."""
    own, found = str(os.getpid()).encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...", with any characters in the name
            if (folder / "stat").read_bytes().rpartition(b")")[2].split()[1] == own:
                found.append(int(folder.name))
    return found


def _adopt_orphans() -> None:
    """Become the parent of orphaned descendants."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spellings(secrets: Sequence[str]) -> list[bytes]:
    """The secrets as text, Python literals and JSON; longest first."""
    forms = {form for key in secrets if key for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1])}
    return sorted((form.encode() for form in forms), key=len, reverse=True)


def copy(source: IO[bytes], target: int, secrets: Sequence[bytes]) -> None:
    """Copy lines to a file descriptor, with secrets replaced by ***, until the source ends."""
    for line in source:
        for secret in secrets:
            line = line.replace(secret, b"***")
        # On a full disk keep reading: the command would block on a full pipe.
        with contextlib.suppress(OSError):
            os.write(target, line)


if __name__ == "__main__":
    sys.exit(main())
