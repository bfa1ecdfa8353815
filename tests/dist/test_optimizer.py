"""What the optimizer and its communication may be asked for: overlap, fused gradients, bfloat16 with float32 sums."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.architecture import FUSION_KERNELS
from tests.dist.test_step import two_steps
from tests.dist.test_teachers import STEPS, start
from tests.pool import RankPool
from tests.tiny import write_tiny_model

OVERLAP = {
    "optimizer.overlap_grad_reduce": True,
    "optimizer.overlap_param_gather": True,
    "optimizer.bucket_size": 3000,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True, seed=3, layers=4)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", tied=False, seed=2, layers=2)


# --- overlap


def trained(folder: Path, overrides: dict[str, Any], steps: int = STEPS) -> tuple[list[float], dict[str, Tensor], Any]:
    """Divergences of all mini-batches, this rank's weights, and (buckets, whether updates were ever left to a pass)."""
    from sdpg_megatron.mcore import policy as learning

    gathered: list[bool] = []
    gather = learning.gather_parameters

    def counted(chunks: Any) -> None:
        gathered.append(True)
        gather(chunks)

    with mock.patch.object(learning, "gather_parameters", counted):
        run = start(folder, overrides)
        found = [value for step in range(steps) for value in run.step(step)]
    weights = {name: weight.clone() for name, weight in run.policy_trainer.named_weights().items()}
    return found, weights, (len(run.policy_trainer.chunks[0].bucket_groups), len(gathered))


@pytest.mark.parametrize("teacher", ["current", "rollout", "ema"])
def test_an_update_that_is_gathered_late_is_read_by_nobody_before(model: Path, ranks: RankPool, teacher: str) -> None:
    """A rank of whose mini-batch nothing is taught runs no teacher; an average reads each update at once."""
    choice = {"objective.teacher": teacher, "objective.teacher_ema": 0.3}
    plain = ranks.run(trained, 2, model, choice)
    found = ranks.run(trained, 2, model, {**choice, **OVERLAP})
    for (expected, expected_weights, _), (divergences, weights, (buckets, gathers)) in zip(plain, found, strict=True):
        assert buckets > 10
        # at the start and after each rollout step; a teacher that reads between mini-batches asks once more
        assert gathers == 1 + STEPS * (1 if teacher == "rollout" else 2)
        assert divergences == pytest.approx(expected, rel=1e-5)
        for name, weight in expected_weights.items():
            assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert all(torch.equal(found[0][1][name], weight) for name, weight in found[1][1].items())


@pytest.mark.parametrize(
    ("kind", "world", "layout"),
    [
        ("model", 2, {"optimizer.overlap_param_gather": False, "optimizer.distributed": False}),
        # three micro-batches on each rank: the last round is filled with an empty one
        (
            "model",
            4,
            {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "optimizer.micro_batch_size": 3},
        ),
        ("mixture", 2, {"parallel.expert": 2}),
    ],
    ids=["plain_optimizer", "vpp2_dp2", "experts"],
)
def test_overlap_learns_the_same(
    request: pytest.FixtureRequest, ranks: RankPool, kind: str, world: int, layout: dict[str, Any]
) -> None:
    folder = request.getfixturevalue(kind)
    late = {**OVERLAP, "optimizer.minibatches": 2}
    expected = ranks.run(two_steps, 1, folder, {})[0]
    found = ranks.run(two_steps, world, folder, {**late, **layout})[0]
    for before, after in zip(expected["metrics"], found["metrics"], strict=True):
        assert after == pytest.approx(before, rel=2e-4, abs=2e-6)
    for name, weight in expected["weights"].items():
        assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


# --- gradients that are added up within the matrix product


def fused_steps(folder: Path, overrides: dict[str, Any]) -> tuple[dict[str, Any] | None, int]:
    """`two_steps` with a stand-in for apex's kernel, and how often that was called."""
    from megatron.core.tensor_parallel import layers

    calls = []

    class Kernel:
        @staticmethod
        def wgrad_gemm_accum_fp32(rows: Tensor, gradients: Tensor, total: Tensor) -> None:
            calls.append(total.dtype)
            total += gradients.float().T @ rows.float()

    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", Kernel, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
    ):
        found = two_steps(folder, {"model.gradient_accumulation_fusion": True, **overrides})
    assert set(calls) <= {torch.float32}
    return found, len(calls)


@pytest.mark.parametrize(("kind", "layers"), [("model", 4 * 4), ("mixture", 2 * 2 + 2 * 4 * 2)])
def test_fused_gradients_are_the_same(request: pytest.FixtureRequest, ranks: RankPool, kind: str, layers: int) -> None:
    """The extension runs on GPUs alone: a stand-in is called in its place, once for each linear layer's gradient."""
    folder = request.getfixturevalue(kind)
    expected = ranks.run(two_steps, 1, folder, {})[0]
    found, calls = ranks.run(fused_steps, 1, folder, {})[0]
    assert found is not None
    assert calls == 2 * 4 * layers  # two steps of four micro-batches
    for name, gradient in expected["gradients"].items():
        assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.gpu
@pytest.mark.skipif(find_spec(FUSION_KERNELS) is None, reason="needs apex's CUDA extension")
def test_fused_gradients_are_the_same_on_a_gpu(model: Path) -> None:
    from sdpg_megatron.mcore import parallel

    try:
        expected, found = two_steps(model, {}), two_steps(model, {"model.gradient_accumulation_fusion": True})
    finally:
        parallel.shutdown()
    assert expected is not None and found is not None
    for name, gradient in expected["gradients"].items():
        assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# --- bfloat16


def bfloat16_steps(folder: Path, overrides: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], set[Any]]:
    """The model's weights, the optimizer's, and the types of gradients and moments, after six mini-batches."""
    from sdpg_megatron.mcore.model import named_parameters

    run = start(folder, {"model.dtype": "bfloat16", "optimizer.distributed": False, **overrides})
    for step in range(STEPS):
        run.step(step)
    named: dict[str, Any] = dict(named_parameters(run.policy_trainer.chunks))
    main = {name: parameter.main_param.detach().clone() for name, parameter in named.items()}
    types = {parameter.main_grad.dtype for parameter in named.values()}
    inner = run.policy_trainer.optimizer.chained_optimizers[0].optimizer
    types |= {value.dtype for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)}
    return {name: weight.clone() for name, weight in run.policy_trainer.named_weights().items()}, main, types


def test_bfloat16_weights_follow_float32_ones(model: Path, ranks: RankPool) -> None:
    """Updates far below a weight's last bit add up; what is learned is what float32 learns, to the pass's rounding."""
    small = {"optimizer.lr": 2e-4}
    weights, main, types = ranks.run(bfloat16_steps, 1, model, small)[0]
    assert types == {torch.float32}
    _, expected, _ = ranks.run(trained, 1, model, small)[0]
    _, before, _ = ranks.run(trained, 1, model, small, steps=0)[0]
    moved = expected_moved = missed = 0.0
    for name, weight in weights.items():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(weight, main[name].bfloat16()), name
        first = before[name].bfloat16().float()
        moved += (main[name] - first).square().sum().item()
        expected_moved += (expected[name] - before[name]).square().sum().item()
        missed += (main[name] - first - expected[name] + before[name]).square().sum().item()
    assert missed < 0.05**2 * expected_moved
    assert moved == pytest.approx(expected_moved, rel=0.1)


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, {}), (2, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 1}), (2, OVERLAP)],
    ids=["dp2", "tp2", "dp2_overlap"],
)
def test_bfloat16_on_other_layouts(model: Path, ranks: RankPool, world: int, layout: dict[str, Any]) -> None:
    narrow = {"model.dtype": "bfloat16", "optimizer.lr": 2e-4}
    expected = ranks.run(two_steps, 1, model, narrow)[0]
    found = ranks.run(two_steps, world, model, {**narrow, **layout})[0]
    for before, after in zip(expected["metrics"], found["metrics"], strict=True):
        for name in ("train/loss", "optimizer/grad_norm", "distill/kl"):
            assert after[name] == pytest.approx(before[name], rel=0.05), name
    for name, weight in expected["weights"].items():
        assert_close(found["weights"][name], weight, rtol=2**-7, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
