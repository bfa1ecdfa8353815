"""Converted checkpoints in megatron-core's own loader under several layouts, and checkpoints of several ranks back."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.convert.load_weights import load_weights_only
from sdpg_megatron.mcore.model import build_chunks, load_weights, named_parameters
from sdpg_megatron.mcore.parallel import initialize
from sdpg_megatron.weights import WeightStream
from tests.pool import RankPool

LAYOUTS = {
    "TP2": ParallelConfig(tensor=2, sequence=True),
    "PP2-VPP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "TP2-PP2": ParallelConfig(tensor=2, pipeline=2),
}
EXPERT_LAYOUTS = {
    "EP2": ParallelConfig(expert=2),
    "TP2-EP2": ParallelConfig(tensor=2, sequence=True, expert=2),
    "PP2-VPP2": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", params=[("qwen2", True), ("qwen3", False)], ids=["qwen2-tied", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    family, tied = request.param
    return write_tiny_model(tmp_path_factory.mktemp("source") / "model", family, tied=tied, seed=3)


def loaded(folder: Path, checkpoint: Path, parallel: ParallelConfig) -> dict[str, Tensor]:
    """The leader's Hugging Face tensors of a model that was filled from a checkpoint."""
    ranks = initialize(parallel, seed=0)
    arch = read_architecture(folder)
    chunks = build_chunks(arch, ModelConfig(path=folder, spec="local"), parallel, ranks)
    params = dict(named_parameters(chunks))
    for parameter in params.values():
        torch.nn.init.constant_(parameter, torch.nan)
    load_weights_only(chunks, checkpoint)
    buckets = WeightStream(
        params,
        arch,
        tp_group=ranks.tensor_group,
        pp_group=ranks.pipeline_group,
        expert_group=ranks.expert_group,
        expert_tensor=ranks.expert_tensor_size,
    )
    return {name: tensor for bucket in buckets for name, tensor in bucket}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_folder_loads_under_any_layout(folder: Path, ranks: RankPool, tmp_path: Path, layout: str) -> None:
    from sdpg_megatron.convert.command import convert

    parallel = LAYOUTS[layout]
    convert(folder, tmp_path / "megatron", console=QUIET)
    world = parallel.tensor * parallel.pipeline
    found = ranks.run(loaded, world, folder, tmp_path / "megatron" / "release", parallel)[0]
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_experts_load_over_expert_parallel_ranks(ranks: RankPool, tmp_path: Path) -> None:
    from sdpg_megatron.convert.command import convert
    from tests.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "model", "qwen3_moe", tied=False, seed=3, layers=2)
    convert(folder, tmp_path / "megatron", console=QUIET)
    parallel = ParallelConfig(tensor=2, sequence=True, expert=2)
    found = ranks.run(loaded, 4, folder, tmp_path / "megatron" / "release", parallel)[0]
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def save(folder: Path, target: Path, parallel: ParallelConfig, metadata: dict[str, object]) -> None:
    """As Megatron-LM saves a model without its optimizer."""
    from megatron.core import dist_checkpointing

    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False  # the pool's workers are; Python lets no daemon fork, as saving does
    ranks = initialize(parallel, seed=0)
    arch = read_architecture(folder)
    chunks = build_chunks(arch, ModelConfig(path=folder, spec="local"), parallel, ranks)
    load_weights(chunks, folder, arch, ranks)
    names = [f"model{number}" for number in range(len(chunks))] if len(chunks) > 1 else ["model"]
    state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in zip(names, chunks, strict=True)}
    if ranks.is_main:
        target.mkdir()
    ranks.barrier()
    dist_checkpointing.save({**state, "iteration": 7}, str(target))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metadata", [{}, {"non_homogeneous_layers": True}], ids=["stacked", "layer-by-layer"])
def test_what_several_ranks_saved_becomes_a_folder(
    folder: Path, ranks: RankPool, tmp_path: Path, layout: str, metadata: dict[str, object]
) -> None:
    comes_back(folder, ranks, tmp_path, LAYOUTS[layout], metadata)


@pytest.mark.parametrize("parallel", EXPERT_LAYOUTS.values(), ids=EXPERT_LAYOUTS)
def test_so_do_experts(ranks: RankPool, tmp_path: Path, parallel: ParallelConfig) -> None:
    from tests.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "experts", "qwen3_moe", tied=False, seed=3, layers=4)
    comes_back(folder, ranks, tmp_path, parallel, {})


def comes_back(
    folder: Path, ranks: RankPool, scratch: Path, parallel: ParallelConfig, metadata: dict[str, object]
) -> None:
    from sdpg_megatron.convert.command import convert

    world = parallel.tensor * parallel.pipeline * parallel.expert
    ranks.run(save, world, folder, scratch / "saved", parallel, metadata)
    convert(scratch / "saved", scratch / "model", like=folder, console=QUIET)
    found, expected = load_file(scratch / "model/model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
