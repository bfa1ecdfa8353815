"""What is said where the disk refuses a file that a run keeps beside its checkpoints, and what it leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpg_megatron.config import RolloutLogConfig
from sdpg_megatron.errors import WriteError
from sdpg_megatron.evaluation.results import Request, Results
from sdpg_megatron.observe.files import Appender, free_mib, write_whole
from sdpg_megatron.observe.report import plot_learning_curve
from sdpg_megatron.observe.rollout_log import RolloutLog
from sdpg_megatron.observe.summary import Summary, write_summary
from sdpg_megatron.observe.truncate import beyond, truncate_lines
from sdpg_megatron.observe.writers import JsonlWriter, TensorBoardWriter, open_writers, read_metrics
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from sdpg_megatron.runtime.run_lock import RunLock
from sdpg_megatron.weights import write_folder
from tests.completions import make_completion
from tests.disk import files_end_at
from tests.tiny import write_tiny_model

Act = Callable[[Path], object]


def summarize(run: Path) -> None:
    numbers: Any = {"accuracy_before": 0.1, "accuracy_after": 0.2, "greedy_before": 0.3, "greedy_after": 0.4}
    write_summary(run, Summary(**numbers, steps=3, seconds=1.5))


def evaluate(run: Path) -> None:
    Results.start(run / "eval", Request(model="m", fingerprint=None, settings={}, data={}))


GROUPS = [
    ScoredGroup(
        Group(Prompt("a:1", (1,), (1,), "2"), (make_completion((3,), (-1.0,), "stop", 0, "2"),)), (1.0,), (0.0,)
    )
]
ACTS: dict[str, Act] = {
    "metrics.jsonl": lambda run: JsonlWriter(run / "metrics.jsonl").write(1, {"a": 0.5}),
    "prompts.jsonl": lambda run: JsonlWriter(run / "prompts.jsonl").append(1, {"prompts": ["a:1"]}),
    "rollouts/step_00000001.jsonl": lambda run: RolloutLog(run / "rollouts", RolloutLogConfig()).write(1, GROUPS, []),
    "tensorboard/events": lambda run: TensorBoardWriter(run / "tensorboard"),
    "config.yaml": lambda run: write_whole(run / "config.yaml", "steps: 3\n"),
    "learning_curve.png": lambda run: plot_learning_curve(run),
    "summary.json": summarize,
    "eval/evaluation.json": evaluate,
    ".lock": lambda run: RunLock(run),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_disk_that_takes_nothing_is_one_error_with_the_file(tmp_path: Path, name: str) -> None:
    if name.endswith("png"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
    with pytest.raises(WriteError) as caught, files_end_at(0):
        ACTS[name](tmp_path)
    said = (
        rf"{re.escape(str(tmp_path / name))}\S*: could not be written: File too large \(\d+ MiB free\)\. .* Fix: free"
    )
    assert re.match(said, str(caught.value))
    assert all(path.stat().st_size == 0 for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".jsonl")


OBSTACLES: dict[str, Act] = {
    "tensorboard": lambda run: open_writers(run),
    "eval": evaluate,
    "missing/summary.json": lambda run: summarize(run / "missing"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_so_is_a_place_where_nothing_can_be_made(tmp_path: Path, name: str) -> None:
    for place in ("tensorboard", "eval"):
        (tmp_path / place).write_text("in the way")
    with pytest.raises(WriteError, match=re.escape(f"{tmp_path / name}: could not be written")):
        OBSTACLES[name](tmp_path)


def test_a_file_that_cannot_be_cut_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    monkeypatch.setattr(os, "truncate", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(WriteError, match=r"metrics\.jsonl: could not be written: Read-only file system"):
        truncate_lines(tmp_path / "metrics.jsonl", beyond(2, evaluated=True))


def test_a_line_that_did_not_fit_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"a": 0.5})
    with pytest.raises(WriteError), files_end_at(path.stat().st_size + 10):
        writer.write(2, {"a": 0.5})
    assert [record["step"] for record in read_metrics(path)] == [1]
    writer.write(2, {"a": 0.25})
    writer.close()
    assert path.read_text() == '{"step": 1, "a": 0.5}\n{"step": 2, "a": 0.25}\n'


def test_closing_does_not_try_again(tmp_path: Path) -> None:
    """Or the error on the way out would stand in the place of the first."""
    file = Appender(tmp_path / "f")
    with files_end_at(4):
        with pytest.raises(WriteError):
            file.append(b"12345678")
        file.close()


def test_what_was_there_stays(tmp_path: Path) -> None:
    write_whole(tmp_path / "f", "before")
    with pytest.raises(WriteError), files_end_at(3):
        write_whole(tmp_path / "f", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f", "before")]


def test_a_model_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""
    source = write_tiny_model(tmp_path / "hf", "qwen3", tied=True, seed=0, layers=1)
    with pytest.raises(OSError, match="File too large"), files_end_at(1000):
        write_folder([[("a", torch.zeros(4096))]], tmp_path / "model", source_folder=source)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_room_is_that_of_the_disk(tmp_path: Path) -> None:
    assert free_mib(tmp_path / "not" / "there") == pytest.approx(free_mib(tmp_path), abs=1024)
    assert free_mib(tmp_path) > 0
