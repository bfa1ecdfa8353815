"""A run's checkpoint becomes the same model as its own export, also one with an optimizer and a teacher beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from sdpg_megatron.cli import main
from sdpg_megatron.convert.inspect import inspect
from tests.e2e.runs import train, weights, write_run


def test_a_runs_checkpoint_becomes_its_export(tmp_path: Path) -> None:
    done = train(write_run(tmp_path), "objective.teacher=ema", "steps=2", ranks=2)
    assert done.returncode == 0, done.stderr
    report = inspect(tmp_path / "run")
    assert (report.kind, report.step, report.family, report.training_state) == ("run checkpoint", 2, "qwen3", True)
    assert report.damage == []
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "model"), "--verify"]) == 0
    found, expected = load_file(tmp_path / "model/model.safetensors"), weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "other"), "--like", str(tmp_path / "model")]) == 2
