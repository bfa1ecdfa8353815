"""A damaged Hugging Face folder is one typed error, the same for training, conversion and inspection."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.convert.command import convert
from sdpg_megatron.convert.inspect import inspect
from sdpg_megatron.errors import SdpgError, WeightError
from sdpg_megatron.weights import load_shards, read_folder, weight_map
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In two files, with their index."""
    root = tmp_path_factory.mktemp("source")
    one = write_tiny_model(root / "one", "llama", tied=False, seed=6, layers=2)
    convert(one, root / "megatron", console=Console(quiet=True))
    convert(root / "megatron", root / "two", shard_bytes=400_000, console=Console(quiet=True))
    assert len(list((root / "two").glob("*.safetensors"))) == 2
    return root / "two"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def cut(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def cut_in_header(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:50])


def flip(at: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray(shard(folder).read_bytes())
        content[at] ^= 0x40
        shard(folder).write_bytes(content)

    return damage


def void(_: object) -> None: ...


def remove(folder: Path) -> None:
    shard(folder).unlink()


def configure(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def store(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Store one tensor otherwise."""

    def damage(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                save_file(tensors | {name: change(tensors[name])}, path)

    return damage


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (cut, r"model-00002-of-00002\.safetensors: .*Fix: "),
    "truncated header": (cut_in_header, r"model-00002-of-00002\.safetensors: .*Fix: "),
    "length of the header": (flip(3), r"model-00002-of-00002\.safetensors: .*Fix: "),
    "brace of the header": (flip(8), r"model-00002-of-00002\.safetensors: .*Fix: "),
    "missing file": (remove, r"model-00002-of-00002\.safetensors: No such file"),
    "LFS pointer": (
        lambda folder: void(shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
        r"model-00002-of-00002\.safetensors: a Git LFS pointer.*Fix: git lfs pull",
    ),
    "heads": (
        configure(num_attention_heads=8),
        r"model-0000\d-of-00002\.safetensors: tensor 'model\.layers\.0\.self_attn\.q_proj\.weight' has shape \[64, 64\]"
        r", expected \[128, 64\] from num_attention_heads = 8 and head_dim.* = 16 in .*config\.json\. Fix",
    ),
    "key-value heads": (
        configure(num_key_value_heads=4),
        r"k_proj\.weight.* from num_key_value_heads = 4 and head_dim",
    ),
    "head size": (
        configure(head_dim=None, num_attention_heads=2),
        r"k_proj\.weight.* head_dim \(or hidden_size / num_",
    ),
    "vocabulary": (configure(vocab_size=320), r"embed_tokens\.weight.* \[320, 64\] from vocab_size = 320 in .*config"),
    "hidden size": (configure(hidden_size=128), r"embed_tokens\.weight.* from hidden_size = 128 in .*config\.json"),
    "feed-forward": (configure(intermediate_size=64), r"gate_proj\.weight.* from intermediate_size = 64 in"),
    "layers": (configure(num_hidden_layers=1), r"index\.json: tensor 'model\.layers\.1\..*' is not in the map"),
    "integers": (
        store(NORM, lambda tensor: (tensor * 100).to(torch.int8)),
        r"model-0000\d-of-00002\.safetensors: tensor 'model\.norm\.weight' has type I8, expected one of F64, .*Fix: ",
    ),
    "eight bits": (store(NORM, lambda tensor: tensor.to(torch.float8_e4m3fn)), "has type F8_E4M3, expected one of F64"),
    "no number": (configure(vocab_size="many"), r"config\.json: vocab_size: found 'many', expected a positive integer"),
}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"num_experts": 8}, r"experts\.4\.gate_proj\.weight' is missing"),
        ({"num_experts": 2}, r"experts\.2\.down_proj\.weight' is not in the map"),
        ({"moe_intermediate_size": 64}, "moe_intermediate_size = 64 in"),
    ],
)
def test_a_config_that_lies_about_experts(tmp_path: Path, changes: dict[str, int], keys: str) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen3_moe", tied=False, seed=6, layers=2)
    configure(**changes)(folder)
    (damage,) = inspect(folder).damage
    assert re.search(keys, damage), damage


@pytest.mark.parametrize("name", DAMAGES)
def test_one_typed_error_everywhere(folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    ways: list[Callable[[], Any]] = [
        lambda: _load(folder),
        lambda: list(read_folder(folder, bucket_bytes=1 << 20)),
        lambda: convert(folder, tmp_path / "target", console=Console(quiet=True)),
    ]
    for way in ways:
        with pytest.raises(SdpgError, match=message):
            way()
    assert not (tmp_path / "target").exists()
    assert any(_matches(message, found) for found in inspect(folder).damage)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("nan")),
        lambda tensor: tensor.bfloat16().index_fill(0, torch.tensor([3]), float("-inf")),
        lambda tensor: tensor.double().index_fill(0, torch.tensor([3]), 1e300),
    ],
    ids=["nan", "inf", "beyond float32"],
)
def test_values_that_are_not_finite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    store(NORM, change)(folder)
    message = (
        r"model-0000\d-of-00002\.safetensors: tensor 'model\.norm\.weight': found 1 of 64 values that are not finite "
        r"in float32, expected finite numbers\. Fix: "
    )
    with pytest.raises(WeightError, match=message):
        _load(folder)
    with pytest.raises(WeightError, match=message):
        list(read_folder(folder, bucket_bytes=1 << 20, dtype=torch.float32))


def _load(folder: Path) -> None:
    arch = read_architecture(folder)
    names = {name: p for name, p in weight_map(arch).items() if "layer_norm_weight" not in name}
    params = {name: torch.empty(p.local_shape(1)) for name, p in names.items()}
    load_shards(params, folder, arch, tp_rank=0, tp_size=1)


def _matches(message: str, text: str) -> bool:
    with pytest.raises(SdpgError, match=message):
        raise SdpgError(text)
    return True


def test_a_renamed_tensor_is_found(folder: Path) -> None:
    path = shard(folder)
    path.write_bytes(path.read_bytes().replace(b"lm_head.weight", b"lm_haed.weight", 1))
    index = folder / "model.safetensors.index.json"
    with pytest.raises(SdpgError, match=r"model-00002-of-00002\.safetensors: the index puts 'lm_head\.weight' here"):
        _load(folder)
    index.write_text(index.read_text().replace("lm_head.weight", "lm_haed.weight"))
    with pytest.raises(SdpgError, match=r"index\.json: tensor 'lm_head\.weight' is missing; did you mean"):
        _load(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/hostname", 3, None, ""])
def test_an_index_stays_in_its_folder(folder: Path, file: object) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(SdpgError, match=r"index\.json: not a safetensors index .*lm_head\.weight: found .*file of"):
        _load(folder)


def test_a_whole_one_has_no_damage(folder: Path) -> None:
    assert inspect(folder).damage == []
    _load(folder)
