"""Drawn command lines, files, model folders and environments end well, or with an error of the package."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.e2e.runs import ROOT

CASES = 300


def test_no_drawn_case_ends_untyped() -> None:
    command = [sys.executable, "benchmarks/fuzz.py", "--cases", str(CASES), "--seed", "19"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=1500)
    assert done.returncode == 0, done.stderr[-20_000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"cases": CASES, "untyped": 0, "hangs": 0}
