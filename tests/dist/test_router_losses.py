"""Losses on routers: those of transformers in float64, sequence by sequence, and the same on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_step import scored_groups, two_steps
from tests.pool import RankPool

VOCAB, LAYERS, EXPERTS, EXPERTS_PER_TOKEN = 300, 4, 4, 2
AUX, Z = 0.7, 0.05
LOSSES = {"model.router_aux_loss": AUX, "model.router_z_loss": Z}
STILL = {"optimizer.lr": 1e-12, "optimizer.clip_grad": 0.0}
"""With these, both steps have the gradients of the weights that they start from."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    return write_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", tied=False, seed=4, layers=LAYERS)


def test_values_and_gradients_are_those_of_a_dense_twin(model: Path, ranks: RankPool) -> None:
    """A sequence's tokens count alike, whatever its length; padding and micro-batches are not there for the twin."""
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    twin = AutoModelForCausalLM.from_pretrained(model).double()
    twin.config._experts_implementation = "eager"  # grouped products have no float64
    sequences = [
        torch.tensor([[*scored.group.prompt.student_tokens, *completion.tokens]])
        for scored in scored_groups(VOCAB)
        for completion in scored.group.completions
    ]
    balance = z = torch.zeros((), dtype=torch.float64)
    for tokens in sequences:
        for layer in twin(tokens, output_router_logits=True).router_logits:
            # transformers counts a token's every choice as 1, Megatron all of them together
            share = load_balancing_loss_func((layer,), EXPERTS, EXPERTS_PER_TOKEN) / EXPERTS_PER_TOKEN
            balance = balance + share * tokens.numel()
            z = z + layer.logsumexp(-1).square().sum()
    count = sum(tokens.numel() for tokens in sequences)
    ((AUX * balance + Z * z) / count).backward()

    plain = ranks.run(two_steps, 1, model, STILL)[0]
    found = ranks.run(two_steps, 1, model, {**STILL, **LOSSES})[0]
    trained = {name: p for name, p in twin.named_parameters() if name in found["gradients"]}
    expected = {n: torch.zeros_like(p).float() if p.grad is None else p.grad.float() for n, p in trained.items()}
    assert sum(name.endswith("mlp.gate.weight") for name in expected) == LAYERS
    for name, gradient in expected.items():
        added = found["gradients"][name] - plain["gradients"][name]
        torch.testing.assert_close(added, gradient, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for step in found["metrics"]:
        assert step["train/router_aux_loss"] == pytest.approx(balance.item() / count / LAYERS, rel=1e-5)
        assert step["train/router_z_loss"] == pytest.approx(z.item() / count / LAYERS, rel=1e-5)
        assert step["train/loss"] == plain["metrics"][0]["train/loss"]
    assert "train/router_aux_loss" not in plain["metrics"][0]


SP = {"parallel.tensor": 2, "parallel.sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_micro_batch": (1, {"optimizer.micro_batch_size": 64}),
    "recompute_micro_batches_of_3": (1, {"model.recompute": True, "optimizer.micro_batch_size": 3}),
    "dp2": (2, {}),
    "tp2": (2, SP),
    "pp2_tp2_recompute": (4, {**SP, "parallel.pipeline": 2, "model.recompute": True}),
    "vpp2_with_fillers": (
        2,
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "optimizer.micro_batch_size": 6},
    ),
    "ep2_tp2": (4, {**SP, "parallel.expert": 2}),
    "padded_tp2": (2, {**SP, "model.packed": False, "optimizer.micro_batch_size": 3}),
    "cp2_ep2": (2, {"parallel.context": 2, "parallel.expert": 2}),
    "cp2_tp2": (4, {**SP, "parallel.context": 2}),
}


@pytest.fixture(scope="module")
def single(model: Path, ranks: RankPool) -> dict[str, Any]:
    return ranks.run(two_steps, 1, model, LOSSES)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_on_every_layout(model: Path, single: dict[str, Any], ranks: RankPool, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    found = ranks.run(two_steps, world, model, {**LOSSES, **overrides})[0]
    for expected, step in zip(single["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    for name, expected in single["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_one_loss_alone(model: Path, ranks: RankPool) -> None:
    found = ranks.run(two_steps, 1, model, {**STILL, "model.router_z_loss": Z})[0]
    assert found["metrics"][0]["train/router_z_loss"] > 0
    assert "train/router_aux_loss" not in found["metrics"][0]
