"""The manifest of a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpg_megatron.checkpoint.changes import Change, check_same_run
from sdpg_megatron.checkpoint.files import FileSum
from sdpg_megatron.checkpoint.state import RunState, digest, fingerprint
from sdpg_megatron.errors import CheckpointError, ConfigError

STATE = RunState(
    step=3,
    cursor={"position": 7},
    seconds=1.5,
    baseline={"eval/x": 0.25},
    evaluated=True,
    config={"seed": 0},
    model="m",
    data="d",
    files={"a": FileSum(1, "x")},
)


def test_it_reads_back_what_it_wrote(tmp_path: Path) -> None:
    STATE.write(tmp_path / "manifest.json")
    assert RunState.read(tmp_path / "manifest.json") == STATE


def changed(text: str, **fields: Any) -> str:
    """A manifest with other fields and the digest that belongs to them."""
    tree = {**json.loads(text), **fields}
    tree.pop("digest")
    return json.dumps(tree | {"digest": digest(tree)})


def test_a_configuration_is_held_against_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    STATE.write(path)
    path.write_text(changed(path.read_text(), config={"seed": 1}))
    with pytest.raises(CheckpointError, match="found a configuration that is not what its digest was made of"):
        RunState.read(path)


@pytest.mark.parametrize("damage", ["", "{", "[]", "7", '{"format": 3}', "[" * 100_000, '{"format": 3, "digest": "x"}'])
def test_a_damaged_one_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(damage)
    with pytest.raises(CheckpointError, match=r"manifest\.json: found .*expected a whole manifest"):
        RunState.read(path)


@pytest.mark.parametrize("fields", [{"step": "three"}, {"cursor": []}, {"files": {"a": 1}}, {"extra": 1}])
def test_one_with_other_contents_is_named(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "manifest.json"
    STATE.write(path)
    path.write_text(changed(path.read_text(), **fields))
    with pytest.raises(CheckpointError, match=r"manifest\.json: found .*expected a whole manifest"):
        RunState.read(path)


@given(st.data())
def test_no_byte_can_change_unnoticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        STATE.write(path)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 2))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            assert RunState.read(path) == STATE  # other white space


def test_one_of_another_format_is_not_misread(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**dataclasses.asdict(STATE), "format": 99}))
    with pytest.raises(CheckpointError, match="found format 99, expected 3"):
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
    check_same_run(started(), tree(**changes), "m", "d")


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
        check_same_run(started(), tree(**changes), "m", "d")


def test_all_that_differs_is_shown_at_once() -> None:
    now = tree(steps=9, objective={"beta": 0.1}, parallel={"tensor": 2})
    with pytest.raises(ConfigError) as error:
        check_same_run(started(), now, "m", "d")
    assert str(error.value).splitlines() == [
        "objective.beta: found 0.1, expected 0.5, as the run was started",
        "  steps: found 9, expected 4, as the run was started",
        "  free to change: parallel.tensor: 1 -> 2",
        "  Fix: restore what is not free to change, or use a new run_dir",
    ]
    assert error.value.field == "objective.beta"


def test_the_error_travels_between_ranks() -> None:
    with pytest.raises(ConfigError) as error:
        check_same_run(started(), tree(steps=9), "m", "d")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_what_is_free_to_change_is_told() -> None:
    changes = check_same_run(started(), tree(parallel={"tensor": 2}), "m", "d")
    assert changes == [Change("parallel.tensor", 1, 2)]


def test_a_field_that_is_new_to_the_package_had_its_default() -> None:
    check_same_run(started(), tree(selection={"oversample": 1.0}), "m", "d")
    with pytest.raises(ConfigError, match=r"selection\.oversample: found 2\.0, expected 1\.0"):
        check_same_run(started(), tree(selection={"oversample": 2.0}), "m", "d")
    with pytest.raises(ConfigError, match=r"tasks\.gcd\.weight: found 1\.0, expected None"):
        check_same_run(started(), tree(reasoning_gym={"tasks": {"gcd": {"weight": 1.0}}}), "m", "d")


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: found 'n', expected the model that the run was started from"):
        check_same_run(started(), tree(), "n", "d")


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data: found 'e', expected the prompts that the run was started with \(d\)"):
        check_same_run(started(), tree(), "m", "e")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "merges.txt"])
def test_a_fingerprint_tells_models_apart_by_every_byte(tmp_path: Path, name: str) -> None:
    content = bytearray(12 * 2**20)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("what is no part of a model")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").unlink()
    assert fingerprint(tmp_path) == before
    content[len(content) // 2] = 1
    (tmp_path / name).write_bytes(content)
    assert fingerprint(tmp_path) != before
