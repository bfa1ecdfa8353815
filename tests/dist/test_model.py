"""The Megatron model computes what transformers computes from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.pool import RankPool
from tests.tiny import write_tiny_model
from tools.prepare_smollm2 import FOLDER, default_cache

SMOLLM2 = default_cache() / FOLDER


def logits(folder: Path, tensor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0's (ours, transformers') logits [2, 17, vocabulary] of the same random tokens."""
    from transformers import AutoModelForCausalLM

    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.forward_step import last_hidden
    from sdpg_megatron.mcore.model import build_chunks, load_weights, output_weight

    config = ParallelConfig(tensor=tensor)
    ranks = parallel.initialize(config, 0)
    arch = read_architecture(folder)
    chunks = build_chunks(arch, ModelConfig(path=folder), config, ranks)
    load_weights(chunks, folder, arch, ranks)
    tokens = torch.randint(arch.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        local = last_hidden(chunks[0], tokens) @ output_weight(chunks[0]).T
        shards = [torch.empty_like(local) for _ in range(tensor)]
        torch.distributed.all_gather(shards, local)
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    return torch.cat(shards, dim=-1)[..., : arch.vocab_size], expected


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)])
def test_logits_of_tiny_models(tmp_path: Path, ranks: RankPool, family: str, tied: bool, tensor: int) -> None:
    folder = write_tiny_model(tmp_path / "model", family, tied=tied, seed=2)
    ours, theirs = ranks.run(logits, tensor, folder, tensor)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.abs().max() > 0.5


def test_logits_with_llama_3_rope(tmp_path: Path, ranks: RankPool) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama", tied=False, seed=2)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, **scaling}
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = ranks.run(logits, 1, folder, 1)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.exists(), reason=f"needs {SMOLLM2}, which scripts/setup.sh prepares")
def test_logits_of_smollm2(ranks: RankPool) -> None:
    ours, theirs = ranks.run(logits, 1, SMOLLM2, 1)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def run_shim_twice() -> tuple[str, str, str]:
    from sdpg_megatron.mcore.compat import device

    device.install()
    device.install()
    one = torch.ones(2, device="cuda")
    return str(one.device), one.cuda().type(), str(one.to("cuda:0").device)


def test_cuda_means_cpu_where_there_is_none(ranks: RankPool) -> None:
    assert ranks.run(run_shim_twice, 1) == [("cpu", "torch.cuda.FloatTensor", "cpu")]


def compiled_sum() -> tuple[bool, bool]:
    """Whether a function that torch.compile has traced gives the value and the gradient of the same one untraced."""
    from sdpg_megatron.mcore.compat import device

    device.install()

    def function(x: torch.Tensor) -> torch.Tensor:
        return (torch.sin(x) * 2 + x.to("cuda")).sum()  # a function of torch: dynamo looks its handlers up

    x = torch.linspace(-1, 1, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x), x)
    traced = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    (found,) = torch.autograd.grad(traced, x)
    return torch.equal(traced, function(x)), torch.equal(found, expected)


def test_functions_compile_after_the_shim_is_installed(ranks: RankPool) -> None:
    assert ranks.run(compiled_sum, 1) == [(True, True)]


def router_gate_with_a_gpu() -> list[float]:
    """A router's logits after `install` on a machine that says it has a GPU, without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    from sdpg_megatron.mcore.compat import device

    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        vars(moe_utils).pop("te_general_gemm", None)  # as megatron-core 0.16 leaves it
        device.install.__wrapped__()
    weight = torch.eye(3)
    logits: torch.Tensor = moe_utils.router_gating_linear(torch.tensor([[1.0, 2.0, 3.0]]), weight, None, torch.float32)
    return logits.flatten().tolist()


def test_a_router_needs_no_transformer_engine_where_a_gpu_is(ranks: RankPool) -> None:
    assert ranks.run(router_gate_with_a_gpu, 1) == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("spec", "dtype", "expected"),
    [("auto", "bfloat16", True), ("auto", "float32", False), ("local", "bfloat16", False), ("te", "bfloat16", True)],
)
def test_transformer_engine_is_chosen_for_what_its_attention_takes(spec: str, dtype: str, expected: bool) -> None:
    from sdpg_megatron.config import ModelConfig
    from sdpg_megatron.mcore import model

    chosen = ModelConfig.model_validate({"path": "model", "spec": spec, "dtype": dtype})
    with mock.patch.object(model, "has_te", lambda: True):
        assert model.uses_te(chosen) == expected
    with mock.patch.object(model, "has_te", lambda: False):
        assert model.uses_te(chosen) == (spec == "te")


def test_the_activation_is_one_kernel_where_a_gpu_compiles_it(tmp_path: Path) -> None:
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.mcore.compat import device
    from sdpg_megatron.mcore.model import transformer_config

    folder = write_tiny_model(tmp_path / "model", "qwen3", tied=True, seed=1)

    def fused(**more: bool) -> bool:
        model = ModelConfig.model_validate({"path": folder, **more})
        found: bool = transformer_config(read_architecture(folder), model, ParallelConfig()).bias_activation_fusion
        return found

    assert not fused()
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        with mock.patch.object(device.importlib.util, "find_spec", lambda name: name == "triton"):
            assert fused() and not fused(activation_fusion=False)
        with mock.patch.object(device.importlib.util, "find_spec", lambda name: None):
            assert not fused()


def fused_steps(folder: Path, overrides: dict[str, Any]) -> tuple[Any, bool]:
    """`two_steps` as with a GPU, but without compiling; and whether megatron-core's fused activation was called."""
    from megatron.core.fusions import fused_bias_swiglu

    from sdpg_megatron.mcore import model
    from tests.dist.test_step import two_steps

    eager = fused_bias_swiglu.swiglu_back
    with (
        mock.patch.object(model, "has_compiled_kernels", lambda: True),
        mock.patch.object(fused_bias_swiglu, "swiglu_back", mock.Mock(wraps=eager)) as fused,
        torch.compiler.set_stance("force_eager"),
    ):
        return two_steps(folder, overrides), fused.called


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_fused_activation_is_the_same_function(tmp_path: Path, ranks: RankPool, family: Any) -> None:
    folder = write_tiny_model(tmp_path / "model", family, tied=True, seed=1)
    (expected, before), (found, after) = (
        ranks.run(fused_steps, 1, folder, {"model.activation_fusion": fused})[0] for fused in (False, True)
    )
    assert (before, after) == (False, True)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for plain, step in zip(expected["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(plain, rel=1e-4, abs=1e-6)
