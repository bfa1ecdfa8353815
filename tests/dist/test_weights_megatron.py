"""The map against the parameters that a real GPTModel has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import Family, read_architecture
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.mcore.model import build_chunks, load_weights, named_parameters
from sdpg_megatron.mcore.parallel import initialize
from sdpg_megatron.weights import WeightStream
from tests.pool import RankPool

MODELS: tuple[tuple[Family, bool], ...] = (("llama", False), ("qwen2", True), ("qwen3", True), ("qwen3", False))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    root = tmp_path_factory.mktemp("models")
    return [
        write_tiny_model(root / f"{family}-{tied}", family, tied=tied, seed=seed)
        for seed, (family, tied) in enumerate(MODELS)
    ]


def round_trips(folders: list[Path], parallel: ParallelConfig) -> list[dict[str, Tensor]]:
    ranks = initialize(parallel, seed=0)
    sent: list[dict[str, Tensor]] = []
    for folder in folders:
        arch = read_architecture(folder)
        chunks = build_chunks(arch, ModelConfig(path=folder, spec="local"), parallel, ranks)
        params = dict(named_parameters(chunks))
        for parameter in params.values():
            torch.nn.init.constant_(parameter, torch.nan)
        load_weights(chunks, folder, arch, ranks)
        assert not any(bool(parameter.isnan().any()) for parameter in params.values())
        buckets = WeightStream(params, arch, tp_group=ranks.tensor_group, pp_group=ranks.pipeline_group)
        sent.append({name: tensor for bucket in buckets for name, tensor in bucket})
    return sent


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(pipeline=2, virtual_pipeline=2),
        ParallelConfig(tensor=2, pipeline=2),
    ],
    ids=["single", "TP2-SP", "PP2", "PP2-VPP2", "TP2-PP2"],
)
def test_round_trip_through_gpt_model(ranks: RankPool, folders: list[Path], parallel: ParallelConfig) -> None:
    leader = ranks.run(round_trips, parallel.tensor * parallel.pipeline, folders, parallel)[0]
    for folder, sent in zip(folders, leader, strict=True):
        saved = load_file(folder / "model.safetensors")
        assert sent.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())
