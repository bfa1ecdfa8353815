"""Runs one command, copies what it prints to its own output without secrets, and ends it with all that it started.

It ends the command when it is told to, and when its parent is gone: also when that was killed and could say nothing.
A program by itself, run by path and with the standard library alone, in a session of its own:

    python -I guard.py <job

Standard input is one line of JSON (see `Job`), then, to end the command, one line with the seconds that it gets to end
by itself. The end of the input means that the parent is gone. Linux only: it adopts orphans (prctl) and reads /proc.
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
"""Seconds between looks at the command and the parent."""
ORPHAN_GRACE = 5.0
"""Seconds that the command gets to end by itself when the parent is gone."""
SETTLE = 2.0
"""Seconds for what the command started to end by itself after it: the helpers of Python and torch that remove shared
memory and semaphores do that when all others are gone."""
KILL_LIMIT = 10.0
"""Seconds until killed processes are gone; one that hangs in a device's driver may stay longer, and is left."""
PR_SET_CHILD_SUBREAPER = 36


class Job(TypedDict):
    """What to run."""

    command: list[str]
    parent: int
    """Process id of who started the guard."""
    input: str
    """The command's standard input."""
    secrets: list[str]
    """What must not appear in the output."""


def main() -> int:
    """Run the job from standard input; the command's exit status, 128 + the signal where a signal ended it."""
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
    """Until the command ends, the order to end it comes, or the parent is gone; the seconds of grace.

    A forked child of the parent may hold the other end of the input open, so the parent is looked at, too.
    """
    while child.poll() is None:
        if os.getppid() != parent:
            return ORPHAN_GRACE
        if select.select([orders], [], [], LOOK)[0]:
            line = orders.readline()
            return float(line) if line else ORPHAN_GRACE
    return 0.0


def _end(child: subprocess.Popen[bytes], grace: float) -> int:
    """End the command and whatever is left of all that it started; its exit code as in subprocess.

    SIGTERM goes to the command alone: it knows in which order its processes end.
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
    """Send a signal to all children again and again until none is left, or the time is up."""
    deadline = time.monotonic() + limit
    while (left := children()) and time.monotonic() < deadline:
        for pid in left:
            os.kill(pid, number)  # the children of one that ends become this process's: the next round finds them
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def children() -> list[int]:
    """Processes whose parent is this one, adopted orphans among them."""
    own, found = str(os.getpid()).encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # "pid (name) state parent ...", where the name may hold anything
            if (folder / "stat").read_bytes().rpartition(b")")[2].split()[1] == own:
                found.append(int(folder.name))
    return found


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none gets out of sight."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spellings(secrets: Sequence[str]) -> list[bytes]:
    """The secrets as a log may show them: as they are, as a Python literal and as JSON; longest first."""
    forms = {form for key in secrets if key for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1])}
    return sorted((form.encode() for form in forms), key=len, reverse=True)


def copy(source: IO[bytes], target: int, secrets: Sequence[bytes]) -> None:
    """Copy line by line to a file descriptor, secrets replaced by ***, until the source ends."""
    for line in source:
        for secret in secrets:
            line = line.replace(secret, b"***")
        # A full disk costs the log, not the command: that would hang if nobody read what it prints.
        with contextlib.suppress(OSError):
            os.write(target, line)


if __name__ == "__main__":
    sys.exit(main())
