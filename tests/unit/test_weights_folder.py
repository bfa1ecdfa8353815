"""A stream becomes a Hugging Face folder that transformers loads, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights import Bucket, read_folder, write_folder
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source"), "qwen3", tied=True, seed=2, layers=2)


def buckets(source: Path, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Iterator[Bucket]:
    for name, tensor in load_file(source / "model.safetensors").items():
        yield Bucket.of([(name, (tensor * scale).to(dtype))])


def fail_half_way(source: Path) -> Iterator[Bucket]:
    for number, bucket in enumerate(buckets(source)):
        if number == 5:
            raise ConnectionError("lost a stage")
        yield bucket


def test_transformers_loads_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    write_folder(buckets(source, scale=2.0), target, source_folder=source)
    model = AutoModelForCausalLM.from_pretrained(target)
    for name, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], 2.0 * tensor)
    assert model.generation_config.eos_token_id == [2, 4]
    chat = [{"role": "user", "content": "12 + 34"}]
    expected = AutoTokenizer.from_pretrained(source).apply_chat_template(chat, tokenize=False)
    assert AutoTokenizer.from_pretrained(target).apply_chat_template(chat, tokenize=False) == expected
    with safe_open(target / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_values_that_are_not_finite_are_not_written(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_folder(buckets(source), target, source_folder=source)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(
        WeightError, match=r"tensor 'model\..*': found \d+ of \d+ values .* not finite in float32, .*Fix: export"
    ):
        write_folder(buckets(source, scale=float("inf")), target, source_folder=source)
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_several_files_of_bounded_size(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_folder(buckets(source), target, source_folder=source, shard_bytes=100_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("model-*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 100_000 for file in files)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("old_key", [None, "dtype", "torch_dtype"])
def test_configuration_says_the_new_type(source: Path, tmp_path: Path, old_key: str | None) -> None:
    edited = tmp_path / "edited"
    edited.mkdir()
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (edited / "config.json").write_text(json.dumps({**config, **({old_key: "float32"} if old_key else {})}))
    write_folder(buckets(source, torch.bfloat16), tmp_path / "model", source_folder=edited)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16
    assert json.loads((tmp_path / "model" / "config.json").read_text())[old_key or "torch_dtype"] == "bfloat16"


def test_failure_leaves_nothing_or_the_earlier_model(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ConnectionError):
        write_folder(fail_half_way(source), target, source_folder=source, shard_bytes=1)
    assert list(tmp_path.iterdir()) == []

    write_folder(buckets(source), target, source_folder=source)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ConnectionError):
        write_folder(fail_half_way(source), target, source_folder=source, shard_bytes=1)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replaces_an_earlier_model_and_a_dead_attempt(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_folder(buckets(source), target, source_folder=source, shard_bytes=100_000)
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "1").write_text("left by a killed run")
    write_folder(buckets(source, scale=3.0), target, source_folder=source)
    assert not list(target.glob("model-*"))
    name = "model.norm.weight"
    assert torch.equal(
        load_file(target / "model.safetensors")[name], 3.0 * load_file(source / "model.safetensors")[name]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_incomplete_stream_makes_no_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"weight stream: tensor '.*' is missing"):
        write_folder(list(buckets(source))[1:], tmp_path / "model", source_folder=source)
    with pytest.raises(WeightError, match="is missing"):
        write_folder([[]], tmp_path / "model", source_folder=source)
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_overwrite_what_is_not_an_export(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WeightError, match="not a model"):
        write_folder(buckets(source), tmp_path, source_folder=source)
    with pytest.raises(WeightError, match="not a model"):
        write_folder(buckets(source), tmp_path / "notes.txt", source_folder=source)
    with pytest.raises(WeightError, match="started from"):
        write_folder(buckets(source), source, source_folder=source)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_is_read_back_as_a_stream(tmp_path: Path, tied: bool) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen2", tied=tied, seed=3, layers=2)
    stored = load_file(folder / "model.safetensors")
    read = list(read_folder(folder, bucket_bytes=100_000, dtype=torch.float64))
    tensors = [item for bucket in read for item in bucket]
    assert sorted(name for name, _ in tensors) == sorted(stored)
    assert all(torch.equal(tensor, stored[name].double()) for name, tensor in tensors)
    assert len(read) > 3
    assert all(len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= 100_000 for bucket in read)
    assert {t.dtype for bucket in read_folder(folder, bucket_bytes=1 << 30) for _, t in bucket} == {torch.float32}


def test_a_tied_copy_in_a_folder_is_left_out(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    copy = stored["model.embed_tokens.weight"].clone()
    save_file({**stored, "lm_head.weight": copy}, folder / "model.safetensors")
    assert {name for bucket in read_folder(folder, bucket_bytes=1) for name, _ in bucket} == set(stored)


def test_a_folder_that_lacks_a_tensor_is_not_streamed(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"tensor 'model\.norm\.weight' is missing"):
        next(read_folder(folder, bucket_bytes=1 << 20))
