"""A run on endless tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import metrics, train, weights, write_run

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install -e '.[gym]'")
GYM = (
    "data.train=[]",
    "data.eval=[]",
    "data.reasoning_gym={tasks: {gcd: {}, letter_counting: {weight: 2}}, held_out: 3}",
    "data.max_prompt_tokens=400",
    "reward.verifier=reasoning_gym",
)


def test_a_run_that_continues_takes_the_prompts_that_it_would_have_taken(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run, whole = tmp_path / "run", tmp_path / "whole"
    done = train(config, *GYM)
    assert done.returncode == 0, done.stderr
    assert "endless prompts of gcd, letter_counting" in done.stdout
    *_, last = sorted((run / "checkpoints").glob("step_*"))
    manifest = json.loads((last / "manifest.json").read_text())
    assert (manifest["cursor"]["size"], manifest["cursor"]["position"]) == (None, 16)

    shutil.copytree(run, whole)
    shutil.rmtree(last)
    (run / "summary.json").unlink()
    continued = train(config, *GYM, fresh=True)  # with a hash seed of its own
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step 2" in continued.stdout
    assert metrics(run) == metrics(whole)
    expected, found = weights(whole), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
