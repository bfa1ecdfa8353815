"""Signals end a process at once, whatever it is busy with; those that ask a run to stop let it save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

STUCK = """
import ctypes
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
def stick():  # as a collective does: in C, without Python's lock, for ever
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""
RUN = (
    STUCK
    + """
from sdpg_megatron.runtime.interrupt import Interrupt
with Interrupt() as interrupt:
    {defer}
    stick()
"""
)
WORK = (
    STUCK
    + """
import signal, sys
from sdpg_megatron.process.signals import interruptible
before = signal.getsignal(signal.SIGINT)
try:
    with interruptible():
        {work}
except KeyboardInterrupt:
    print("cleaned up")
assert signal.getsignal(signal.SIGINT) is before
"""
)
IMPORTS = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "sdpg_megatron.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
Signal = signal.Signals


def run(program: str, *signals: Signal, ignored: Signal | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of a program that gets signals once it is ready, one after the other."""

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # a test run in the background ignores the first
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    line = [sys.executable, "-c", program]
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, text=True, preexec_fn=prepare, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            time.sleep(0.3)
            process.send_signal(number)
        try:
            output, errors = process.communicate(timeout=1.0 if ignored else 20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_the_ranks_have_met_a_signal_ends_the_run_at_once(number: Signal) -> None:
    code, _, errors = run(RUN.format(defer="pass"), number)
    assert (code, errors) == (75, f"{number.name}: stopped before the first step; the same command starts the run\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_afterwards_the_second_one_does_also_in_a_collective(number: Signal) -> None:
    code, _, errors = run(RUN.format(defer="interrupt.defer()"), signal.SIGTERM, number)
    assert code == 128 + number
    assert errors.splitlines() == [
        "SIGTERM: the run saves and stops; a second signal ends it at once",
        f"{number.name}: ended at once; the same command continues from the last save",
    ]


def test_afterwards_a_hangup_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But under torchrun, which passes it on when it ends."""
    program = RUN.format(defer="interrupt.defer()")
    code, _, errors = run(program, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert [line.partition(":")[0] for line in errors.splitlines()] == ["SIGTERM", "SIGTERM"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    code, _, errors = run(program, signal.SIGHUP, signal.SIGHUP)
    assert code == 128 + signal.SIGHUP
    assert errors.startswith("SIGHUP: the run saves and stops")


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    code, _, errors = run(RUN.format(defer="pass"), signal.SIGHUP, ignored=signal.SIGHUP)
    assert (code, errors) == (-signal.SIGKILL, "")


def test_work_is_interrupted_and_cleans_up() -> None:
    for work in ("print('ready', flush=True); import time; time.sleep(60)", swallowing("raise ImportError")):
        assert run(WORK.format(work=work), signal.SIGINT) == (0, "cleaned up\n", "")
    code, _, errors = run(WORK.format(work="stick()"), signal.SIGINT, signal.SIGINT)
    assert (code, errors) == (130, "stopped at once\n")


def swallowing(then: str) -> str:
    """Work whose interrupt becomes another error, as it may while modules are imported."""
    return f"""
        import time
        try:
            print('ready', flush=True); time.sleep(60)
        except BaseException:
            {then}"""


def test_a_forked_child_keeps_its_signals_to_itself(tmp_path: Path) -> None:
    program = """
import os, signal, time
from sdpg_megatron.runtime.interrupt import Interrupt
with Interrupt() as interrupt:
    interrupt.defer()
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.3)
    assert not interrupt.requested and os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
print("ready")
"""
    assert run(program) == (0, "", "")


@pytest.mark.parametrize("module", ["sdpg_megatron", "sdpg_megatron.launch"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str) -> None:
    program = IMPORTS.format(module=module).replace(
        '"sdpg_megatron.cli"', '"sdpg_megatron.cli"' if module == "sdpg_megatron" else '"sdpg_megatron.launch.machine"'
    )
    line = [sys.executable, "-c", program]
    interruptible: Callable[[], object] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, preexec_fn=interruptible, env=os.environ)
    assert (done.returncode, done.stderr) == (130, "stopped\n")
