"""The manifest of a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpg_megatron.checkpoint.files import FileSum
from sdpg_megatron.checkpoint.state import FORMAT, BranchPoint, RecordedChange, RunState, digest, fingerprint
from sdpg_megatron.errors import CheckpointError

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
    changes=(RecordedChange(2, "optimizer.lr", 0.1, 0.2), RecordedChange(2, "data.train", ["a"], [])),
    branches=(BranchPoint("/runs/a", 1),),
)


def test_it_reads_back_what_it_wrote(tmp_path: Path) -> None:
    STATE.write(tmp_path / "manifest.json")
    assert RunState.read(tmp_path / "manifest.json") == STATE


def test_one_from_before_changes_and_branches_reads_too(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    STATE.write(path)
    fields = json.loads(path.read_text())
    del fields["changes"], fields["branches"], fields["digest"]
    path.write_text(json.dumps(fields | {"digest": digest(fields)}))
    assert RunState.read(path) == dataclasses.replace(STATE, changes=(), branches=())


def changed(text: str, **fields: Any) -> str:
    """A manifest with other fields and the digest that belongs to them."""
    tree = {**json.loads(text), **fields}
    tree.pop("digest")
    return json.dumps(tree | {"digest": digest(tree)})


def test_a_configuration_is_held_against_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    STATE.write(path)
    path.write_text(changed(path.read_text(), config={"seed": 1}))
    with pytest.raises(CheckpointError, match="found a configuration that does not match its digest"):
        RunState.read(path)


DAMAGED = ["", "{", "[]", "7", f'{{"format": {FORMAT}}}', "[" * 100_000, f'{{"format": {FORMAT}, "digest": "x"}}']


@pytest.mark.parametrize("damage", DAMAGED)
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
    with pytest.raises(CheckpointError, match=f"found format 99, expected {FORMAT}"):
        RunState.read(path)


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
