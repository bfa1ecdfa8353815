"""Loading: what is read, what is cast, and what a damaged folder says. Layouts are in test_weights_map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights.load import SafetensorsFolder, load_shards
from sdpg_megatron.weights.map import weight_map
from tests.tiny import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", "qwen2", tied=True, seed=1, layers=2)


def empty_params(arch: Architecture, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: torch.full(parameter.local_shape(size), torch.nan, dtype=dtype)
        for name, parameter in weight_map(arch).items()
    }


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_reads_no_more_than_the_rank_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = read_architecture(folder)
    read_elements = 0
    read = SafetensorsFolder.read

    def counting(self: SafetensorsFolder, name: str, dim: int, start: int, length: int) -> Tensor:
        nonlocal read_elements
        part = read(self, name, dim, start, length)
        read_elements += part.numel()
        return part

    monkeypatch.setattr(SafetensorsFolder, "read", counting)
    # without the second spelling of the norms and the tied copy of the embedding, which hold the same tensors again
    params = {
        name: tensor
        for name, tensor in empty_params(arch, 2).items()
        if "layer_norm_weight" not in name and name != "output_layer.weight"
    }
    load_shards(params, folder, arch, tp_rank=0, tp_size=2)
    assert read_elements == sum(tensor.numel() for tensor in params.values())
    assert not any(tensor.isnan().any() for tensor in params.values())


def test_casts_to_the_parameter_and_writes_in_place(folder: Path) -> None:
    arch = read_architecture(folder)
    params = {name: torch.nn.Parameter(p) for name, p in empty_params(arch, 1, torch.bfloat16).items()}
    places = {name: parameter.data_ptr() for name, parameter in params.items()}
    load_shards(params, folder, arch, tp_rank=0, tp_size=1)
    whole = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(params["decoder.final_layernorm.weight"], whole.bfloat16())
    assert places == {name: parameter.data_ptr() for name, parameter in params.items()}


def test_tied_output_copy_is_the_embedding(folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}  # not mapped
    rewrite(folder, {**tensors, "lm_head.weight": torch.zeros(300, 64)})
    arch = read_architecture(folder)
    params = empty_params(arch, 2)
    load_shards(params, folder, arch, tp_rank=1, tp_size=2)
    assert torch.equal(params["output_layer.weight"], params["embedding.word_embeddings.weight"])
    assert torch.equal(params["output_layer.weight"][:44], tensors["model.embed_tokens.weight"][256:])


def test_several_files_with_an_index(folder: Path) -> None:
    arch = read_architecture(folder)
    expected, params = empty_params(arch, 1), empty_params(arch, 1)
    load_shards(expected, folder, arch, tp_rank=0, tp_size=1)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}  # not mapped
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_shards(params, folder, arch, tp_rank=0, tp_size=1)
    assert all(torch.equal(params[name], expected[name]) for name in expected)

    index["weight_map"][names[0]] = "b.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightError, match=rf"b\.safetensors: the index puts '{names[0]}' here, but"):
        load_shards(params, folder, arch, tp_rank=0, tp_size=1)
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightError, match=r"b\.safetensors: .*Fix: "):
        load_shards(params, folder, arch, tp_rank=0, tp_size=1)


def test_faults_leave_the_parameters_alone(folder: Path) -> None:
    arch = read_architecture(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}  # not mapped
    params = empty_params(arch, 1)
    name = "model.layers.1.mlp.down_proj.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, rf"'{name}' is missing"),
        ({**tensors, "model.layers.2.mlp.down_proj.weight": tensors[name].clone()}, r"layers\.2.*not in the map"),
        ({**tensors, name: tensors[name].t().contiguous()}, r"shape \[128, 64\], expected \[64, 128\]"),
    ):
        rewrite(folder, changed)
        with pytest.raises(WeightError, match=message):
            load_shards(params, folder, arch, tp_rank=0, tp_size=1)
    rewrite(folder, tensors)
    with pytest.raises(WeightError, match=r"'output_layer\.wieght'.*did you mean 'output_layer\.weight'"):
        load_shards({**params, "output_layer.wieght": torch.empty(1)}, folder, arch, tp_rank=0, tp_size=1)
    assert all(bool(tensor.isnan().all()) for tensor in params.values())


@pytest.mark.parametrize("content", [None, b"not a safetensors file"])
def test_folder_without_usable_weights(folder: Path, content: bytes | None) -> None:
    arch = read_architecture(folder)
    (folder / "model.safetensors").unlink()
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightError, match=r"Fix: "):
        load_shards(empty_params(arch, 1), folder, arch, tp_rank=0, tp_size=1)


def test_broken_index(folder: Path) -> None:
    arch = read_architecture(folder)
    (folder / "model.safetensors").unlink()
    for text in ("{", "{}", "[]"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WeightError, match="not a safetensors index"):
            load_shards(empty_params(arch, 1), folder, arch, tp_rank=0, tp_size=1)
