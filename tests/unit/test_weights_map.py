"""The map against hand-written indexing, and what it says about names it does not know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import Architecture, Family, read_architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights.load import load_shards
from sdpg_megatron.weights.map import check_folder, check_local, hf_shapes, weight_map
from tests.tiny import write_tiny_model

FAMILIES: tuple[tuple[Family, bool], ...] = (
    ("llama", False),
    ("qwen2", True),
    ("qwen3", True),
    ("qwen3", False),
    ("qwen3_moe", False),
    ("mixtral", True),
)
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("qwen3"), "qwen3", tied=False, seed=3, layers=2, heads=HEADS, kv_heads=KV_HEADS
    )


@pytest.fixture(scope="module")
def arch(folder: Path) -> Architecture:
    return read_architecture(folder)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_tensors_are_those_that_transformers_saves(tmp_path: Path, family: Family, tied: bool) -> None:
    write_tiny_model(tmp_path, family, tied=tied, seed=0, layers=2)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert hf_shapes(read_architecture(tmp_path)) == saved


def shard(arch: Architecture, folder: Path, name: str, rank: int, size: int) -> Tensor:
    """The parameter `name` of a tensor-parallel rank, as `load_shards` leaves it, with the rest of its layer."""
    layer = weight_map(arch)[name].layer
    params = {
        other: torch.full(parameter.local_shape(size), torch.nan)
        for other, parameter in weight_map(arch).items()
        if parameter.layer == layer
    }
    load_shards(params, folder, arch, tp_rank=rank, tp_size=size)
    return params[name]


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (2, 4)])
def test_qkv_rows_are_grouped_by_key_value_head(arch: Architecture, folder: Path, rank: int, size: int) -> None:
    hf = load_file(folder / "model.safetensors")
    q, k, v = (hf[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    rows: list[Tensor] = []
    for kv_head in range(KV_HEADS):
        for q_head in (2 * kv_head, 2 * kv_head + 1):
            rows += [q[q_head * HEAD_DIM + d] for d in range(HEAD_DIM)]
        rows += [k[kv_head * HEAD_DIM + d] for d in range(HEAD_DIM)]
        rows += [v[kv_head * HEAD_DIM + d] for d in range(HEAD_DIM)]
    share = len(rows) // size
    expected = torch.stack(rows[rank * share : (rank + 1) * share])
    assert torch.equal(shard(arch, folder, "decoder.layers.1.self_attention.linear_qkv.weight", rank, size), expected)


def test_qkv_bias_has_the_rows_of_its_weight(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen2", tied=True, seed=5, layers=1)
    hf, arch = load_file(tmp_path / "model.safetensors"), read_architecture(tmp_path)
    q, k, v = (hf[f"model.layers.0.self_attn.{x}_proj.bias"] for x in "qkv")
    # 4 query heads and 2 key-value heads of 16: rank 1 has query heads 2 and 3, and key-value head 1
    expected = torch.cat([q[32:64], k[16:32], v[16:32]])
    assert torch.equal(shard(arch, tmp_path, "decoder.layers.0.self_attention.linear_qkv.bias", 1, 2), expected)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_gate_comes_before_up_in_every_shard(arch: Architecture, folder: Path, rank: int, size: int) -> None:
    hf = load_file(folder / "model.safetensors")
    gate, up = (hf[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    share = len(gate) // size
    first = rank * share
    expected = torch.stack([gate[first + i] for i in range(share)] + [up[first + i] for i in range(share)])
    assert torch.equal(shard(arch, folder, "decoder.layers.0.mlp.linear_fc1.weight", rank, size), expected)


@pytest.mark.parametrize(
    ("megatron", "hf_name"),
    [("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")],
)
def test_row_parallel_layers_share_input_columns(arch: Architecture, folder: Path, megatron: str, hf_name: str) -> None:
    whole = load_file(folder / "model.safetensors")[f"model.layers.1.{hf_name}.weight"]
    columns = whole.shape[1] // 2
    found = shard(arch, folder, f"decoder.layers.1.{megatron}.weight", 1, 2)
    assert torch.equal(found, whole[:, columns : 2 * columns])


@pytest.mark.parametrize(("size", "real_rows"), [(1, [300]), (2, [256, 44]), (4, [128, 128, 44, 0])])
def test_vocabulary_padding_is_zero(arch: Architecture, folder: Path, size: int, real_rows: Sequence[int]) -> None:
    hf = load_file(folder / "model.safetensors")
    for name, tensor in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        first = 0
        for rank, real in enumerate(real_rows):
            found = shard(arch, folder, f"{name}.weight", rank, size)
            assert found.shape[0] == arch.padded_vocab(size) // size
            assert torch.equal(found[:real], hf[f"{tensor}.weight"][first : first + real])
            assert torch.equal(found[real:], torch.zeros_like(found[real:]))
            first += real


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pieces_cover_every_tensor_once(arch: Architecture, size: int) -> None:
    for name, parameter in weight_map(arch).items():
        counts = [torch.zeros(shape[parameter.layout.dim]) for shape in parameter.tensors.values()]
        for rank in range(size if parameter.layout.sharded else 1):
            pieces = parameter.pieces(rank, size)
            assert sum(piece.length for piece in pieces) == parameter.local_shape(size)[parameter.layout.dim]
            for source, start, length in pieces:
                if source is not None:
                    counts[source][start : start + length] += 1
        assert all(bool((count == 1).all()) for count in counts), name


def test_both_spellings_of_the_norms_hold_the_same_tensor(arch: Architecture) -> None:
    known = weight_map(arch)
    for local, fused in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ):
        assert known[f"decoder.layers.1.{local}"] == known[f"decoder.layers.1.{fused}"]


def one_layer(arch: Architecture) -> dict[str, tuple[int, ...]]:
    return {name: parameter.local_shape(1) for name, parameter in weight_map(arch).items() if parameter.layer == 0}


def test_unknown_parameter_names_the_near_ones(arch: Architecture) -> None:
    message = "'decoder.layers.0.mlp.linear_fcl.weight' is not in the map.*did you mean.*linear_fc1.weight"
    with pytest.raises(WeightError, match=message):
        check_local(weight_map(arch), {"decoder.layers.0.mlp.linear_fcl.weight": (1, 1)}, 1)
    with pytest.raises(WeightError, match=r"decoder\.layers\.2\."):
        check_local(weight_map(arch), {"decoder.layers.2.mlp.linear_fc1.weight": (1, 1)}, 1)


def test_wrong_shape_says_both(arch: Architecture) -> None:
    shapes = {"embedding.word_embeddings.weight": (300, 64)}
    with pytest.raises(WeightError, match=r"shape \[300, 64\], expected \[384, 64\] on each of 1 "):
        check_local(weight_map(arch), shapes, 1)


def test_layer_without_a_parameter_is_refused(arch: Architecture) -> None:
    shapes = one_layer(arch)
    check_local(weight_map(arch), shapes, 1)
    del shapes["decoder.layers.0.self_attention.k_layernorm.weight"]
    message = r"'model\.layers\.0\.self_attn\.k_norm\.weight' has no place.*k_layernorm\.weight'"
    with pytest.raises(WeightError, match=message):
        check_local(weight_map(arch), shapes, 1)


def test_checkpoint_must_hold_exactly_the_model(arch: Architecture) -> None:
    names = list(hf_shapes(arch))
    check_folder(arch, [*names, "model.layers.0.self_attn.rotary_emb.inv_freq"], "F")
    with pytest.raises(WeightError, match=r"F: tensor 'model\.norm\.bias' is not in the map.*'model\.norm\.weight'"):
        check_folder(arch, [*names, "model.norm.bias"], "F")
    with pytest.raises(WeightError, match=re.escape("F: tensor 'lm_head.weight' is missing")):
        check_folder(arch, [name for name in names if name != "lm_head.weight"], "F")
    typo = [name.replace("layers.1.mlp.up_proj", "layers.1.mlp.upp_proj") for name in names]
    with pytest.raises(WeightError, match=r"'model.layers.1.mlp.up_proj.weight' is missing; did you mean .*upp_proj"):
        check_folder(arch, typo, "F")


def test_tied_checkpoint_may_repeat_the_embedding(tmp_path: Path) -> None:
    arch = read_architecture(write_tiny_model(tmp_path, "llama", tied=True, seed=0, layers=1))
    assert "lm_head.weight" not in hf_shapes(arch)
    check_folder(arch, [*hf_shapes(arch), "lm_head.weight"], "F")
