"""Experts in the map: whose they are, how they are cut, and what is said of those that are elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import Architecture, Family, read_architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights.load import SafetensorsFolder, load_shards
from sdpg_megatron.weights.map import ExpertShare, check_local, hf_shapes, weight_map
from tests.tiny import EXPERTS, write_tiny_model

NAMES: dict[Family, tuple[str, str, str, str]] = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp(request.param), request.param, tied=False, seed=3, layers=2)


@pytest.fixture(scope="module")
def arch(folder: Path) -> Architecture:
    return read_architecture(folder)


def empty(arch: Architecture, share: ExpertShare, grouped: bool = False) -> dict[str, Tensor]:
    """A rank's parameters of layer 1, in one of the spellings that experts have."""
    held = range(EXPERTS * share.rank // share.size, EXPERTS * (share.rank + 1) // share.size)
    return {
        name: torch.full(p.local_shape(1 if p.expert is None else share.tensor_size), torch.nan)
        for name, p in weight_map(arch).items()
        if p.layer == 1
        and "layer_norm_weight" not in name
        and (p.expert is None or (p.expert in held and ("local_experts" not in name) == grouped))
    }


@pytest.mark.parametrize("grouped", [False, True], ids=["modules", "grouped"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_share_of_its_own_experts(
    arch: Architecture, folder: Path, rank: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    plain = SafetensorsFolder.read

    def noting(self: SafetensorsFolder, name: str, dim: int, start: int, length: int) -> Tensor:
        read.add(name)
        return plain(self, name, dim, start, length)

    monkeypatch.setattr(SafetensorsFolder, "read", noting)
    share = ExpertShare(rank=rank, size=2, tensor_rank=1, tensor_size=2)
    params = empty(arch, share, grouped)
    load_shards(params, folder, arch, tp_rank=0, tp_size=1, experts=share)
    hf = load_file(folder / "model.safetensors")
    block, gate, up, down = NAMES[arch.family]
    spelling = "mlp.experts.{1}.weight{0}" if grouped else "mlp.experts.local_experts.{0}.{1}.weight"
    columns = arch.ffn_size // 2
    for expert in (2 * rank, 2 * rank + 1):
        stem = f"model.layers.1.{block}.experts.{expert}"
        fc1, fc2 = (params[f"decoder.layers.1.{spelling.format(expert, fc)}"] for fc in ("linear_fc1", "linear_fc2"))
        assert torch.equal(fc1[:columns], hf[f"{stem}.{gate}.weight"][columns:])
        assert torch.equal(fc1[columns:], hf[f"{stem}.{up}.weight"][columns:])
        assert torch.equal(fc2, hf[f"{stem}.{down}.weight"][:, columns:])
    assert torch.equal(params["decoder.layers.1.mlp.router.weight"], hf[f"model.layers.1.{block}.gate.weight"])
    assert {name.split(".")[5] for name in read if ".experts." in name} == {str(2 * rank), str(2 * rank + 1)}


def test_experts_come_one_after_the_other(arch: Architecture) -> None:
    block, gate, up, down = NAMES[arch.family]
    names = [name for name in hf_shapes(arch) if f"layers.1.{block}." in name]
    experts = [f"experts.{e}.{part}" for e in range(EXPERTS) for part in (gate, up, down)]
    assert names == [f"model.layers.1.{block}.{stem}.weight" for stem in ("gate", *experts)]


def test_an_expert_of_another_rank_or_none_is_refused(arch: Architecture) -> None:
    share = ExpertShare(rank=1, size=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty(arch, share).items()}
    check_local(weight_map(arch), shapes, 1, share)
    with pytest.raises(WeightError, match=r"local_experts\.2\..* expert-parallel rank 0 of 2, which does not hold"):
        check_local(weight_map(arch), shapes, 1, ExpertShare(rank=0, size=2))
    with pytest.raises(WeightError, match=r"local_experts\.2\.linear_fc1.* shape \[64, 64\], expected \[32, 64\]"):
        check_local(weight_map(arch), shapes, 1, ExpertShare(rank=1, size=2, tensor_size=2))
    del shapes["decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"]
    with pytest.raises(WeightError, match=r"'model\.layers\.1\..*\.experts\.3\..*' has no place"):
        check_local(weight_map(arch), shapes, 1, share)
