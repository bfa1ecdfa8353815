"""What is planned is what Megatron allocates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.dist.test_step import config_of
from tests.e2e.runs import ROOT, environment
from tests.pool import RankPool
from tests.tiny import write_tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")
DENSE: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (2, {"parallel.tensor": 2}),
    (2, {"parallel.pipeline": 2}),
    (4, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.tensor": 2, "parallel.sequence": True}),
    (4, {"parallel.context": 2}),
    (2, {"optimizer.distributed": False}),
    (2, {"model.dtype": "bfloat16"}),
    (2, {"model.dtype": "bfloat16", "optimizer.distributed": False}),
)
MIXED: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (4, {"parallel.expert": 2}),
    (4, {"parallel.expert": 4, "parallel.tensor": 2, "parallel.sequence": True, "parallel.expert_tensor": 1}),
    (4, {"parallel.expert": 2, "parallel.pipeline": 2, "model.dtype": "bfloat16"}),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plan")
    return {
        family: write_tiny_model(root / family, family, tied=family in ("llama", "qwen3"), seed=3)  # type: ignore[arg-type]
        for family in FAMILIES
    }


def nbytes(tensors: list[torch.Tensor]) -> int:
    """Of the memory behind them, shared or not."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated(folder: Path, overrides: dict[str, Any]) -> dict[str, int]:
    """Elements of parameters; bytes of parameters, gradient buffers and, after a step, what the optimizer keeps."""
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer

    config = config_of(folder, {"objective.alpha": 0.0, "objective.beta": 0.0, **overrides})
    ranks = parallel.initialize(config.parallel, 0)
    policy_trainer = PolicyTrainer(
        config, read_architecture(folder), objectives.build_objective(config.objective, 4), ranks
    )
    for chunk in policy_trainer.chunks:
        chunk.zero_grad_buffer()
    policy_trainer.optimizer.step()
    parameters = [p.data for chunk in policy_trainer.chunks for p in chunk.parameters()]
    laid = [buffer for chunk in policy_trainer.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    held = [t for part in policy_trainer.optimizer.chained_optimizers for t in kept(part)]
    places = {t.untyped_storage().data_ptr() for t in parameters}
    return {
        "numel": sum(p.numel() for p in parameters),
        "weights": nbytes(parameters),
        "gradients": nbytes([buffer.grad_data for buffer in laid]),
        "optimizer": nbytes([t for t in held if t.untyped_storage().data_ptr() not in places]),
    }


def kept(part: Any) -> list[torch.Tensor]:
    """Moments, and the parameters that the optimizer itself updates; torch counts steps in single numbers."""
    states = [value for state in part.optimizer.state.values() for value in state.values()]
    own = [p.data for group in part.optimizer.param_groups for p in group["params"]]
    return [t for t in (*states, *own) if isinstance(t, torch.Tensor) and t.dim()]


def planned(folder: Path, overrides: dict[str, Any], world: int, rank: int) -> dict[str, int]:
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.estimate.load import Load
    from sdpg_megatron.estimate.memory import stage_memory
    from sdpg_megatron.estimate.shards import Grid

    config = config_of(folder, {"objective.alpha": 0.0, "objective.beta": 0.0, **overrides})
    grid = Grid.of(config.parallel, world)
    stage, within = divmod(rank, world // grid.pipeline)
    copy = within // grid.tensor
    found = stage_memory(
        read_architecture(folder),
        config,
        grid,
        Load.of(config, grid.data),
        stage,
        None,
        rank=copy,
        expert_rank=within // (grid.expert * grid.expert_tensor),
    )
    return {name: getattr(found, name) for name in ("numel", "weights", "gradients", "optimizer")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_holds_what_was_planned(folders: dict[str, Path], ranks: RankPool, family: str) -> None:
    for world, overrides in MIXED if family in ("qwen3_moe", "mixtral") else DENSE:
        if family == "mixtral" and world == 1:
            continue
        found = ranks.run(allocated, world, folders[family], overrides)
        assert found == [planned(folders[family], overrides, world, rank) for rank in range(world)], overrides


def test_parameters_of_the_whole_model(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.estimate.shards import count_parameters

    for family, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert count_parameters(read_architecture(folder)) == sum(p.numel() for p in model.parameters()), family


def saved(folder: Path, dtype: str, recompute: bool, tokens: int, fused: bool = False) -> int:
    """Bytes that autograd keeps of a forward pass over packed sequences, parameters left out.

    `fused`: with the activation of a GPU, which is not compiled here.
    """
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.forward_step import last_hidden
    from sdpg_megatron.mcore.model import build_chunks

    ranks = parallel.initialize(ParallelConfig(), 0)
    model = ModelConfig(path=folder, dtype=dtype, recompute=recompute)  # type: ignore[arg-type]
    with mock.patch("sdpg_megatron.mcore.model.has_compiled_kernels", lambda: fused):
        (chunk,) = build_chunks(read_architecture(folder), model, ParallelConfig(), ranks)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor)
        return tensor

    eager = torch.compiler.set_stance("force_eager")
    with eager, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        last_hidden(chunk, torch.zeros(1, tokens, dtype=torch.int64), (tokens // 3, tokens - tokens // 3))
    return nbytes(kept)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_keep_what_was_planned(folders: dict[str, Path], ranks: RankPool, dtype: str, fused: bool) -> None:
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.estimate.activations import Activations

    for family, folder in folders.items():
        arch, tokens = read_architecture(folder), 96
        model = ModelConfig(path=folder, dtype=dtype)  # type: ignore[arg-type]
        a = Activations.of(arch, model, ParallelConfig(), cuda=False, fused=fused)
        w = 2 if dtype == "bfloat16" else 4
        handed_on = arch.hidden_size * w  # the final norm's output is kept by the caller
        numbers = 8 + 24  # of the tokens, and their places among those of the buckets
        expected = tokens * (arch.num_layers * a.layer + a.final_norm - handed_on + numbers)
        (found,) = ranks.run(saved, 1, folder, dtype, False, tokens, fused)
        assert found == pytest.approx(expected, rel=0.01), family


@pytest.mark.parametrize("case", ["as it is", "recompute"])
def test_an_update_takes_the_memory_that_was_planned(case: str) -> None:
    command = [sys.executable, "-m", "benchmarks.plan", case]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["planned_mib"] > 800, "small beside the interpreter"
    assert 0.9 < report["ratio"] < 1.1, report
