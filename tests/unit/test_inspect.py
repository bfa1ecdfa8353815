"""What ``sdpg-megatron inspect`` says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from sdpg_megatron import cli
from sdpg_megatron.checkpoint.files import FileSum, fsync_and_hash
from sdpg_megatron.checkpoint.state import MANIFEST, RunState, fingerprint
from sdpg_megatron.convert.command import convert
from sdpg_megatron.convert.inspect import inspect
from sdpg_megatron.errors import CheckpointError, ConversionError
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "model", "qwen2", tied=True, seed=7, layers=2)


@pytest.fixture
def megatron(model: Path, tmp_path: Path) -> Path:
    convert(model, tmp_path / "megatron", dtype="bfloat16", console=Console(quiet=True))
    return tmp_path / "megatron"


def test_a_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(model)
    stored = load_file(model / "model.safetensors")
    assert (report.kind, report.family, report.layers, report.hidden) == ("Hugging Face folder", "qwen2", 2, 64)
    assert (report.heads, report.kv_heads, report.vocabulary, report.files) == (4, 2, 300, 1)
    assert report.parameters == sum(tensor.numel() for tensor in stored.values())
    assert (report.bytes, report.dtype, report.damage) == (4 * report.parameters, "float32", [])
    assert cli.main(["inspect", str(model)]) == 0
    assert f"parameters     {report.parameters:,}\n" in capsys.readouterr().out


def test_a_megatron_checkpoint(megatron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(megatron)
    assert (report.kind, report.family, report.step) == ("Megatron checkpoint", "qwen2", 0)
    assert (report.dtype, report.layout, report.training_state) == ("bfloat16", "tensor 1 x pipeline 1", False)
    assert report.versions == {"checkpoint": "3.0"} and report.damage == []
    assert cli.main(["inspect", str(megatron / "release"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(report.to_json())


def test_a_run_checkpoint(model: Path, megatron: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    shutil.copytree(megatron / "release", checkpoint)
    config = {"model": {"path": str(model)}, "parallel": {"tensor": 2, "pipeline": 1, "virtual_pipeline": None}}
    state = RunState(
        step=3, cursor={}, seconds=1.0, baseline={}, evaluated=True, config=config, model=fingerprint(model), data="d"
    )
    state.write(checkpoint / MANIFEST)
    for path in (checkpoint, checkpoint.parent, tmp_path / "run"):
        report = inspect(path)
        assert (report.kind, report.step, report.layout) == ("run checkpoint", 3, "tensor 2 x pipeline 1")
        assert (report.family, report.model, report.path) == ("qwen2", str(model), str(checkpoint))
        assert report.damage == []
    convert(tmp_path / "run", tmp_path / "back", console=Console(quiet=True))
    common = checkpoint / "common.pt"
    summed = dataclasses.replace(state, files={"common.pt": FileSum(common.stat().st_size + 1, "")})
    summed.write(checkpoint / MANIFEST)
    assert [str(common) in damage for damage in inspect(checkpoint).damage] == [True]
    before = dataclasses.replace(state, files={"common.pt": fsync_and_hash(common)})
    before.write(checkpoint / MANIFEST)
    content = bytearray(common.read_bytes())
    content[len(content) // 2] ^= 1
    common.write_bytes(content)
    assert not any("sha256" in damage for damage in inspect(checkpoint).damage)
    assert any("common.pt: found sha256 " in damage for damage in inspect(checkpoint, digests=True).damage)
    with pytest.raises(CheckpointError, match=r"common\.pt: found sha256 .*Fix: restore the file"):
        convert(checkpoint, tmp_path / "again", console=Console(quiet=True))
    with pytest.raises(ConversionError, match=r"--digests: found a Hugging Face folder"):
        inspect(model, digests=True)


def test_a_flipped_byte_of_a_run_checkpoint_is_not_converted(model: Path, megatron: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_00000003"
    shutil.copytree(megatron / "release", checkpoint)
    files = {path.name: fsync_and_hash(path) for path in checkpoint.iterdir()}
    config = {"model": {"path": str(model)}}
    RunState(
        step=3,
        cursor={},
        seconds=1.0,
        baseline={},
        evaluated=True,
        config=config,
        model=fingerprint(model),
        data="d",
        files=files,
    ).write(checkpoint / MANIFEST)
    convert(checkpoint, tmp_path / "whole", console=Console(quiet=True))
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    norm = load_file(tmp_path / "whole/model.safetensors")["model.norm.weight"]
    content[content.index(norm.view(torch.uint8).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert inspect(checkpoint).damage == []
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: found sha256 .*as the manifest says\. Fix"):
        convert(checkpoint, tmp_path / "target", console=Console(quiet=True))
    assert not (tmp_path / "target").exists()


def test_a_newest_checkpoint_without_its_manifest_is_not_passed_over(model: Path, tmp_path: Path) -> None:
    config = {"model": {"path": str(model)}}
    state = RunState(step=2, cursor={}, seconds=1.0, baseline={}, evaluated=True, config=config, model="m", data="d")
    for step in (2, 3):
        (tmp_path / f"run/checkpoints/step_0000000{step}").mkdir(parents=True)
    state.write(tmp_path / "run/checkpoints/step_00000002" / MANIFEST)
    newest = tmp_path / "run/checkpoints/step_00000003"
    (newest / "metadata.json").touch()
    for path in (tmp_path / "run", tmp_path / "run/checkpoints", newest):
        for read in (inspect, lambda path: convert(path, tmp_path / "target", console=Console(quiet=True))):
            with pytest.raises(CheckpointError, match=r"step_00000003/manifest\.json: found .*No such file"):
                read(path)


def test_damage_is_told_and_makes_the_exit_code(megatron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = megatron / "release/__0_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])
    assert cli.main(["inspect", str(megatron)]) == 2
    text = capsys.readouterr().out
    assert "damage " in text and "__0_0.distcp: found 1000 bytes, expected" in text
    path.unlink()
    assert "__0_0.distcp: found no such file" in inspect(megatron).damage[0]
    (megatron / "release/common.pt").write_bytes(b"")
    (megatron / "release/.metadata").write_bytes(b"")
    assert [".metadata" in damage for damage in inspect(megatron).damage] == [True]


def test_a_config_that_contradicts_the_checkpoint(megatron: Path) -> None:
    path = megatron / "huggingface/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 4}))
    found = "\n".join(inspect(megatron).damage)
    assert "linear_qkv.weight'" in found and "num_query_groups: found 2, expected 4" in found


def test_what_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConversionError, match="found no known format"):
        inspect(tmp_path)
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "found no such path" in capsys.readouterr().err
