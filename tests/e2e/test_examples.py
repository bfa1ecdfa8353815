"""The shipped examples run as their documentation says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.e2e.runs import ROOT, environment


@pytest.mark.parametrize(
    "launch",
    [
        "examples/plugin.py",
        "-m torch.distributed.run --standalone --nproc-per-node 4 examples/plugin.py --tensor 2 --pipeline 2",
    ],
    ids=["one_rank", "tp2_pp2"],
)
def test_the_plugin_trains_a_model_of_ones_own(launch: str) -> None:
    done = subprocess.run(
        [sys.executable, *launch.split()], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    divergences = [float(value) for value in re.findall(r"KL ([\d.]+)", done.stdout)]
    assert len(set(divergences)) > 1, done.stdout
    assert divergences[-1] < divergences[0]
