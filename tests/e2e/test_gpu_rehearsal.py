"""The GPU benchmark runs to its end on a CPU, at tiny sizes, and a part that fails spoils no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import NAMES
from tests.e2e.runs import ROOT


def rehearse(folder: Path, *more: str) -> tuple[int, dict[str, dict[str, object]], str]:
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--minutes", "10", "--out", str(folder), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=900)
    return done.returncode, json.loads((folder / "gpu.json").read_text()), done.stdout + done.stderr


def test_every_part_runs(tmp_path: Path) -> None:
    parts = [name for name in NAMES if name != "train_1.7b"]  # at these sizes it is train again
    code, found, said = rehearse(tmp_path, "--only", *parts)
    assert code == 0, said + "".join(path.read_text() for path in tmp_path.glob("*.log"))[-5000:]
    assert set(parts) <= set(found)
    assert found["tests"]["failed"] == 0
    assert "left_out" in found["sglang"]
    assert {"tokens_per_second", "mfu", "planned_gib", "calls"} <= set(found["train"])
    assert {"rollout", "prepare", "update"} <= set(found["run"]["seconds"])  # type: ignore[call-overload]
    assert all(f"{name:<12}" in said for name in parts)


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path: Path) -> None:
    code, found, said = rehearse(tmp_path, "--only", "machine", "sglang", "--sglang-python", "/no/such/python")
    assert code == 1
    assert "matmul_tflops" in found["machine"]
    assert "error" in found["sglang"] and "sglang" in said
    assert "/no/such/python" in (tmp_path / "sglang.log").read_text()
