"""One run in one folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdpg_megatron.errors import ConfigError
from sdpg_megatron.train.presence import RunLock, end_with_launcher

HOLD = """
import sys
from pathlib import Path
from sdpg_megatron.train.presence import RunLock
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


def test_without_torchrun_nothing_is_asked_of_the_system() -> None:
    end_with_launcher({})
