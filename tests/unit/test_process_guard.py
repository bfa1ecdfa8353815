"""The guard of a server process, with small commands in the server's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from sdpg_megatron.rollout.sglang import process_guard, server

LIMIT = 15.0
"""Seconds within which anything here happens."""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("started", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
POLITE = """
import os, signal, sys, time
def bye(*_):
    print("bye", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, bye)
print("started", os.getpid(), flush=True)
time.sleep(600)
"""
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(log: Path) -> Iterator[Start]:
    """Starts a guard for a Python program; kills its session at the end, whatever happened."""
    processes = []

    def begin(
        program: str, *, given: str = "", secrets: tuple[str, ...] = (), to: Path = log
    ) -> subprocess.Popen[bytes]:
        with to.open("ab") as target:
            process = subprocess.Popen(
                [sys.executable, "-I", process_guard.__file__],
                stdin=subprocess.PIPE,
                stdout=target,
                stderr=target,
                start_new_session=True,
            )
        processes.append(process)
        job: process_guard.Job = {
            "command": [sys.executable, "-c", program],
            "parent": os.getpid(),
            "input": given,
            "secrets": list(secrets),
        }
        tell(process, json.dumps(job))
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        opened(process).close()


def opened(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def tell(process: subprocess.Popen[bytes], line: str) -> None:
    opened(process).write(line.encode() + b"\n")
    opened(process).flush()


def started(log: Path) -> list[int]:
    """The process ids that a program prints when it is ready."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines() if log.exists() else []:
            if line.startswith("started"):
                return [int(word) for word in line.split()[1:]]
        time.sleep(0.05)
    raise AssertionError(f"the program does not start: {log.read_text()}")


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_copies_output_and_gives_the_exit_status(start: Start, log: Path) -> None:
    process = start(
        "import sys; print('out', flush=True); print(sys.stdin.read(), file=sys.stderr); sys.exit(7)", given="in"
    )
    assert process.wait(LIMIT) == 7
    assert log.read_text() == "out\nin\n"


def test_a_signal_becomes_an_exit_status(start: Start) -> None:
    assert start("import os; os.kill(os.getpid(), 9)").wait(LIMIT) == 128 + 9


def test_secrets_are_taken_out_in_every_spelling(start: Start, log: Path) -> None:
    long, short = "it's\\open\"sesame", "sesame"
    program = "import json, sys; k = sys.stdin.read(); print(k); print({'key': k}); print(json.dumps(k)); print('fine')"
    assert start(program, given=long, secrets=(short, long)).wait(LIMIT) == 0
    assert log.read_text() == "***\n{'key': '***'}\n\"***\"\nfine\n"


def test_a_full_disk_does_not_hold_the_command_up(start: Start) -> None:
    program = "import sys; sys.stdout.write(('x' * 99 + '\\n') * 10_000)"
    assert start(program, to=Path("/dev/full")).wait(LIMIT) == 0


def test_told_to_end_it_kills_what_ignores_it_and_what_left_the_session(start: Start, log: Path) -> None:
    process = start(STUBBORN)
    pids = started(log)
    assert len(pids) == 2 and all(map(lives, pids))
    tell(process, "0.3")
    assert process.wait(LIMIT) == 128 + 9
    assert not any(map(lives, pids))


def test_a_stopped_command_ends_in_order(start: Start, log: Path) -> None:
    process = start(POLITE)
    (pid,) = started(log)
    os.kill(pid, signal.SIGSTOP)
    tell(process, str(LIMIT))
    assert process.wait(LIMIT) == 3
    assert log.read_text().endswith("bye\n")


def test_what_cleans_up_after_the_command_gets_to_do_so(start: Start, log: Path) -> None:
    """As Python's resource tracker does: it waits for the end of a pipe that all others hold."""
    helper = "import sys, time; sys.stdin.read(); time.sleep(0.3); print('clean', flush=True)"
    program = f"""
import os, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", {helper!r}], stdin=subprocess.PIPE)
print("started", os.getpid(), helper.pid, flush=True)
time.sleep(600)
"""
    process = start(program)
    pids = started(log)
    tell(process, "0")
    assert process.wait(LIMIT) == 128 + 9
    assert log.read_text().endswith("clean\n") and not any(map(lives, pids))


def test_without_grace_it_is_killed_at_once(start: Start, log: Path) -> None:
    process = start(POLITE)
    started(log)
    tell(process, "0")
    assert process.wait(LIMIT) == 128 + 9
    assert "bye" not in log.read_text()


def test_what_the_command_leaves_behind_is_ended(start: Start, log: Path) -> None:
    process = start(STUBBORN.replace("time.sleep(600)\n", "", 1).replace("signal.SIG_IGN", "signal.SIG_DFL"))
    assert process.wait(LIMIT) == 0
    assert not any(map(lives, started(log)))


@pytest.mark.parametrize("way", ["input ends", "guard is terminated"])
def test_the_command_ends_with_its_guard(start: Start, log: Path, way: str) -> None:
    process = start(POLITE)
    (pid,) = started(log)
    if way == "input ends":
        opened(process).close()
        assert process.wait(LIMIT) == 3
    else:
        process.terminate()
        assert process.wait(LIMIT) == 128 + signal.SIGTERM
    assert not lives(pid)


def test_the_command_ends_with_a_parent_whose_pipe_stays_open(log: Path) -> None:
    """As where a trainer was killed and a child that it had forked lives on."""
    program = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True).wait()"
    with log.open("ab") as target:
        parent = subprocess.Popen(
            [sys.executable, "-c", program, sys.executable, "-I", process_guard.__file__],
            stdin=subprocess.PIPE,
            stdout=target,
            stderr=target,
        )
    job = {"command": [sys.executable, "-c", POLITE], "parent": parent.pid, "input": "", "secrets": []}
    tell(parent, json.dumps(job))
    (pid,) = started(log)
    parent.kill()
    parent.wait(LIMIT)
    deadline = time.monotonic() + LIMIT
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(pid) and log.read_text().endswith("bye\n")
    opened(parent).close()


def test_a_parent_that_is_gone_before_the_job_starts_nothing(log: Path) -> None:
    process = subprocess.run([sys.executable, "-I", process_guard.__file__], stdin=subprocess.DEVNULL, timeout=LIMIT)
    assert process.returncode == 1


def test_what_a_killed_guard_leaves_is_ended_by_its_parent(log: Path) -> None:
    program = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('started', child.pid, flush=True); child.wait()"
    )
    with log.open("ab") as target:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=target, start_new_session=True
        )
    (pid,) = started(log)
    process.kill()
    process.wait(LIMIT)
    assert lives(pid)
    server.end(process, grace=LIMIT)
    deadline = time.monotonic() + LIMIT
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not lives(pid)
