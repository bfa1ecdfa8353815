"""One run in one folder."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdpg_megatron.errors import ConfigError
from sdpg_megatron.runtime.run_lock import RunLock, end_with_launcher

HOLD = """
import sys
from pathlib import Path
from sdpg_megatron.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_runs_until_its_process_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"run_dir: found '{run}'.*\(process {holder.pid} on \S+ does\)"):
            RunLock(run, patience=0)
        holder.kill()
    RunLock(run, patience=0).close()
    RunLock(run, patience=0).close()


CHILD = """
import os, sys, time
from sdpg_megatron.runtime.run_lock import end_with_parent
end_with_parent(int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid())
print("here", flush=True)
time.sleep(120)
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")


@linux
def test_a_process_ends_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        parent.kill()
        assert select.select([parent.stdout], [], [], 30)[0]  # the child had the other end open, too
        assert parent.stdout.read() == ""


@linux
def test_an_orphan_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(os.getpid() + 1)], capture_output=True, timeout=30)
    assert done.returncode == -signal.SIGKILL and not done.stdout


def test_without_torchrun_nothing_is_asked_of_the_system() -> None:
    end_with_launcher({})
