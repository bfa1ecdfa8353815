"""The interpreter that the GPU benchmark gives SGLang servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_parts import write_interpreter

TELL = "import json, os, sys; print(json.dumps([sys.path, os.environ['LD_LIBRARY_PATH'], sys.executable]))"


@pytest.mark.parametrize("isolated", [True, False])
def test_it_has_the_packages_before_those_of_this_process(
    isolated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages, own = tmp_path / "packages", tmp_path / "own"
    monkeypatch.setenv("PYTHONPATH", str(own))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/driver")
    python = write_interpreter(tmp_path / "python", packages)
    monkeypatch.delenv("PYTHONPATH")  # a server does not get the trainer's
    command = [str(python), *(["-I"] if isolated else []), "-c", TELL]
    path, libraries, executable = json.loads(subprocess.check_output(command, encoding="utf-8"))
    assert path.index(str(packages)) < path.index(str(own))
    assert libraries.split(":")[0] == "/driver"
    assert executable == sys.executable
