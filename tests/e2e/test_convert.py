"""A run's checkpoint becomes the same model as its own export, also one with an optimizer and a teacher beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdpg_megatron.cli import main
from sdpg_megatron.convert.inspect import inspect
from tests.e2e.runs import train, weights, write_run
from tests.tiny import write_tiny_model


def test_a_runs_checkpoint_becomes_its_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = train(write_run(tmp_path), "objective.teacher=ema", "steps=2", ranks=2)
    assert done.returncode == 0, done.stderr
    report = inspect(tmp_path / "run")
    assert (report.kind, report.step, report.family, report.training_state) == ("run checkpoint", 2, "qwen3", True)
    assert report.damage == []
    assert {"sdpg-megatron", "megatron-core", "torch"} <= report.versions.keys()
    assert report.layout == "tensor 1 x pipeline 1 x context 1 x expert 1"
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "model"), "--verify"]) == 0
    assert largest_difference(capsys) < 1e-4
    found, expected = load_file(tmp_path / "model/model.safetensors"), weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "other"), "--like", str(tmp_path / "model")]) == 2
    (tmp_path / "run/model/config.json").unlink()  # the export, which evaluating would take
    (tmp_path / "run/checkpoints/step_00000002/manifest.json").unlink()
    assert main(["eval", str(tmp_path / "run"), "--out", str(tmp_path / "eval")]) == 2
    assert "step_00000002/manifest.json: found " in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_both_models_give_the_same_logits(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "model", family, tied=False, seed=2, layers=2)
    assert main(["convert", str(model), str(tmp_path / "megatron"), "--verify", "two and two"]) == 0
    assert largest_difference(capsys) < 1e-4


def largest_difference(capsys: pytest.CaptureFixture[str]) -> float:
    said = re.search(r"largest difference of logits: (\S+); largest logit: (\S+)", capsys.readouterr().err)
    assert said is not None
    assert float(said[2]) > 0.01
    return float(said[1])
