"""The manifest of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.checkpoint.state import RunState, check_same_run, fingerprint
from sdpg_megatron.errors import CheckpointError, ConfigError

STATE = RunState(
    step=3, cursor={"position": 7}, seconds=1.5, baseline={"eval/x": 0.25}, evaluated=True, config={}, model="m"
)


def test_it_reads_back_what_it_wrote(tmp_path: Path) -> None:
    STATE.write(tmp_path / "manifest.json")
    assert RunState.read(tmp_path / "manifest.json") == STATE


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 1, "step": 3, "extra": 1}'])
def test_a_damaged_one_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(damage)
    with pytest.raises(CheckpointError, match=r"manifest\.json.*Fix"):
        RunState.read(path)


def test_one_of_another_format_is_not_misread(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**dataclasses.asdict(STATE), "format": 99}))
    with pytest.raises(CheckpointError, match="found format 99, expected 1"):
        RunState.read(path)


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "steps": 4,
        "parallel": {"tensor": 1},
        "objective": {"beta": 0.5},
        "data": {"eval": [], "train": ["a"]},
    } | changes


def started() -> RunState:
    return dataclasses.replace(STATE, config=tree())


@pytest.mark.parametrize("changes", [{}, {"parallel": {"tensor": 2}}, {"data": {"eval": ["b"], "train": ["a"]}}])
def test_what_changes_nothing_that_is_learnt_may_change(changes: dict[str, Any]) -> None:
    check_same_run(started(), tree(**changes), "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"beta": 0.1}}, r"objective\.beta: found 0\.1, expected 0\.5, as the run was started"),
        ({"data": {"eval": [], "train": ["b"]}}, r"data\.train: found \['b'\], expected \['a'\]"),
        ({"steps": 9}, "steps: found 9"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_same_run(started(), tree(**changes), "m")


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: found 'n', expected the model that the run was started from"):
        check_same_run(started(), tree(), "n")


def test_a_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
