"""Experts from a Hugging Face folder into real models and back, over every layout of theirs, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import Family, read_architecture
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.errors import WeightError
from sdpg_megatron.mcore.model import build_chunks, load_weights, named_parameters
from sdpg_megatron.mcore.parallel import ParallelState, initialize
from sdpg_megatron.weights import WeightStream, hf_shapes
from tests.pool import RankPool

FAMILIES: tuple[Family, ...] = ("qwen3_moe", "mixtral")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2_tp2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    "ep2_within_tp2_pp2": (4, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1, "pipeline": 2}),
    "ep2_vpp2": (4, {"expert": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "whole_experts_in_tp2": (2, {"tensor": 2, "sequence": True, "expert_tensor": 1}),
    "two_replicas": (4, {"expert": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    root = tmp_path_factory.mktemp("models")
    return [write_tiny_model(root / family, family, tied=family == "mixtral", seed=3) for family in FAMILIES]


def stream(params: dict[str, Tensor], folder: Path, ranks: ParallelState) -> WeightStream:
    return WeightStream(
        params,
        read_architecture(folder),
        tp_group=ranks.tensor_group,
        pp_group=ranks.pipeline_group,
        expert_group=ranks.expert_group,
        expert_tensor=ranks.expert_tensor_size,
        bucket_bytes=100_000,
    )


def filled(folder: Path, parallel: ParallelConfig, ranks: ParallelState) -> dict[str, Tensor]:
    arch = read_architecture(folder)
    chunks = build_chunks(arch, ModelConfig(path=folder, spec="local"), parallel, ranks)
    params = {name: parameter.data for name, parameter in named_parameters(chunks)}
    for parameter in params.values():
        parameter.fill_(torch.nan)
    load_weights(chunks, folder, arch, ranks)
    assert not any(bool(parameter.isnan().any()) for parameter in params.values())
    return params


def round_trips(folders: list[Path], layout: dict[str, Any]) -> tuple[bool, list[list[list[tuple[str, Tensor]]]]]:
    """Whether this rank leads a replica, and the buckets that it got of each model."""
    parallel = ParallelConfig(**layout)
    ranks = initialize(parallel, seed=0)
    return ranks.leads_replica, [list(stream(filled(f, parallel, ranks), f, ranks)) for f in folders]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_through_gpt_models(ranks: RankPool, folders: list[Path], layout: str) -> None:
    found = ranks.run(round_trips, LAYOUTS[layout][0], folders, LAYOUTS[layout][1])
    assert [rank for rank, (leads, _) in enumerate(found) if leads] == ([0, 2] if layout == "two_replicas" else [0])
    for leads, models in found:
        for folder, buckets in zip(folders, models, strict=True):
            saved = load_file(folder / "model.safetensors")
            sent = [item for bucket in buckets for item in bucket]
            assert [name for name, _ in sent] == (list(hf_shapes(read_architecture(folder))) if leads else [])
            assert all(torch.equal(tensor, saved[name]) for name, tensor in sent)
            assert len(buckets) == len(found[0][1][folders.index(folder)]) > 3


def faulty(folder: Path) -> list[str]:
    """Expert-parallel rank 1 of two lacks an expert, then has another's in its place."""
    parallel = ParallelConfig(expert=2)
    ranks = initialize(parallel, seed=0)
    params = filled(folder, parallel, ranks)
    last = params.pop("decoder.layers.3.mlp.experts.local_experts.3.linear_fc2.weight", None)
    found = []
    for _ in range(2):
        with pytest.raises(WeightError) as caught:
            next(stream(params, folder, ranks))
        found.append(str(caught.value))
        if last is not None:
            params["decoder.layers.3.mlp.experts.local_experts.1.linear_fc2.weight"] = last
    return found


def test_a_fault_on_one_rank_is_raised_on_all(ranks: RankPool, folders: list[Path]) -> None:
    first, second = ranks.run(faulty, 2, folders[0])
    assert "'model.layers.3.mlp.experts.3.down_proj.weight' has no place" in first[0]
    assert "local_experts.1.linear_fc2.weight' is on expert-parallel rank 1 of 2, which does not hold" in first[1]
    assert first == second
