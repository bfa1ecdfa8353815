"""A converted folder in Megatron-LM's own loader, where megatron-core's package has it."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.mcore.model import build_chunks, named_parameters
from sdpg_megatron.mcore.parallel import initialize
from sdpg_megatron.weights import WeightStream
from tests.pool import RankPool

OPTIONS: dict[str, Any] = {
    "auto_detect_ckpt_format": False,
    "bf16": False,
    "ckpt_assume_constant_structure": False,
    "ckpt_format": "torch_dist",
    "ckpt_fully_parallel_load": False,
    "ckpt_load_validate_sharding_integrity": True,
    "ckpt_step": None,
    "data_parallel_random_init": False,
    "dist_ckpt_strictness": "assume_ok_unexpected",
    "exit_on_missing_checkpoint": True,
    "fp16": False,
    "finetune": False,
    "iteration": None,
    "load_main_params_from_ckpt": False,
    "log_progress": False,
    "no_load_optim": False,
    "no_load_rng": False,
    "no_save_optim": False,
    "no_save_rng": True,
    "non_persistent_ckpt_type": None,
    "non_persistent_global_ckpt_dir": None,
    "override_ckpt_iteration": None,
    "phase_transition_iterations": None,
    "pretrained_checkpoint": None,
    "stream_ckpt_dequant": False,
    "use_dist_ckpt": True,
    "use_distributed_optimizer": True,
    "use_mp_args_from_checkpoint_args": False,
    "use_tokenizer_model_from_checkpoint_args": False,
    "verify_integrity": False,
    "vocab_file": None,
}
"""As Megatron-LM's command line leaves them; what says what the model is, is taken from the checkpoint."""


def loaded(folder: Path, target: Path, layout: ParallelConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments that Megatron-LM takes from the checkpoint, and the model that it fills."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.safe_globals import register_safe_globals
    from megatron.training import checkpointing, global_vars

    ranks = initialize(layout, seed=0)
    arch = read_architecture(folder)
    sizes = {"tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline}
    arguments = Namespace(load=str(target), **OPTIONS, **sizes, world_size=ranks.world, data_parallel_size=1)
    register_safe_globals()  # as Megatron-LM's start does
    checkpointing.load_args_from_checkpoint(arguments)
    arguments.use_distributed_optimizer = True
    global_vars.unset_global_variables()
    global_vars.set_args(arguments)
    init_num_microbatches_calculator(0, None, 1, 1, 1)
    chunks = build_chunks(arch, ModelConfig(path=folder, spec="local"), layout, ranks)
    params = dict(named_parameters(chunks))
    for parameter in params.values():
        torch.nn.init.constant_(parameter, torch.nan)
    assert checkpointing.load_checkpoint(chunks, None, None)[0] == 0
    buckets = WeightStream(params, arch, tp_group=ranks.tensor_group, pp_group=ranks.pipeline_group)
    return vars(arguments), {name: tensor for bucket in buckets for name, tensor in bucket}


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="needs a megatron-core that brings megatron.training"
)
def test_megatron_lm_opens_it(ranks: RankPool, tmp_path: Path) -> None:
    from sdpg_megatron.convert.command import convert
    from tests.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "model", "qwen3", tied=False, seed=9, layers=2)
    convert(folder, tmp_path / "megatron", console=Console(quiet=True))
    layout = ParallelConfig(tensor=2, pipeline=2)
    arguments, found = ranks.run(loaded, 4, folder, tmp_path / "megatron", layout)[0]
    assert (arguments["num_layers"], arguments["num_query_groups"], arguments["kv_channels"]) == (2, 2, 32)
    assert arguments["swiglu"] and arguments["normalization"] == "RMSNorm" and arguments["padded_vocab_size"] == 384
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
