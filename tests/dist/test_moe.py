"""Mixtures of experts: what transformers computes, and one training step that is the same on every layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sdpg_megatron.records import ScoredGroup
from tests.dist import test_step
from tests.dist.test_step import scored_groups, two_steps
from tests.pool import RankPool

KINDS = {"qwen3_moe": ("qwen3_moe", True), "qwen3_moe_shares": ("qwen3_moe", False), "mixtral": ("mixtral", True)}
"""Family, and whether the weights of a token's experts are normalized."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    root = tmp_path_factory.mktemp("moe")
    return {
        kind: write_tiny_model(root / kind, family, tied=kind == "mixtral", seed=2, layers=2, normalized=normalized)
        for kind, (family, normalized) in KINDS.items()
    }


def tokens() -> torch.Tensor:
    return torch.randint(300, (2, 18), generator=torch.Generator().manual_seed(1))


def logits(folders: dict[str, Path], parallel: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each model's logits [2, 18, vocabulary]."""
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.mcore import parallel as groups
    from sdpg_megatron.mcore.forward_step import last_hidden
    from sdpg_megatron.mcore.model import build_chunks, load_weights, output_weight

    config = ParallelConfig(**parallel)
    ranks = groups.initialize(config, 0)
    found = {}
    for kind, folder in folders.items():
        arch = read_architecture(folder)
        chunks = build_chunks(arch, ModelConfig(path=folder), config, ranks)
        load_weights(chunks, folder, arch, ranks)
        with torch.no_grad():
            local = last_hidden(chunks[0], tokens()) @ output_weight(chunks[0]).T
        shards = [torch.empty_like(local) for _ in range(ranks.tensor_size)]
        torch.distributed.all_gather(shards, local, group=ranks.tensor_group)
        found[kind] = torch.cat(shards, dim=-1)[..., : arch.vocab_size]
    return found


@pytest.fixture(scope="module")
def expected_logits(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        models = {kind: AutoModelForCausalLM.from_pretrained(folder) for kind, folder in folders.items()}
        return {kind: model(tokens()).logits for kind, model in models.items()}


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {}),
        (2, {"expert": 2}),
        (2, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1, "dispatcher": "allgather"}),
    ],
    ids=["single", "ep2", "tp2_ep2_allgather"],
)
def test_logits_are_those_of_transformers(
    folders: dict[str, Path],
    expected_logits: dict[str, torch.Tensor],
    ranks: RankPool,
    world: int,
    parallel: dict[str, Any],
) -> None:
    for found in ranks.run(logits, world, folders, parallel):
        for kind, theirs in expected_logits.items():
            torch.testing.assert_close(found[kind], theirs, rtol=0, atol=1e-5)
            assert theirs.abs().max() > 0.5


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "allgather": (
        2,
        {
            "parallel.tensor": 2,
            "parallel.sequence": True,
            "parallel.expert": 2,
            "parallel.expert_tensor": 1,
            "parallel.dispatcher": "allgather",
        },
    ),
    "micro_batches_of_3": (1, {"optimizer.micro_batch_size": 3}),
}
"""What tests/dist/test_invariance.py does not have. No gradient is summed over ranks that then hold a part of it."""


@pytest.fixture(scope="module")
def single(folders: dict[str, Path], ranks: RankPool) -> dict[str, Any]:
    return ranks.run(two_steps, 1, folders["qwen3_moe"], {})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_on_every_layout(
    folders: dict[str, Path], single: dict[str, Any], ranks: RankPool, layout: str
) -> None:
    world, overrides = LAYOUTS[layout]
    found = ranks.run(two_steps, world, folders["qwen3_moe"], overrides)[0]
    for expected, step in zip(single["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    for part in ("weights", "gradients"):
        assert single[part].keys() == found[part].keys()
        for name, expected in single[part].items():
            torch.testing.assert_close(
                found[part][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def unmarked_steps(folder: Path, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """`two_steps` of a model whose expert weights Megatron built without the mark of tensor parallelism."""
    from megatron.core.models.gpt import GPTModel

    from sdpg_megatron.mcore import model

    removed = []

    def build(*args: Any, **options: Any) -> Any:
        chunk = GPTModel(*args, **options)
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                del parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride
                removed.append(name)
        return chunk

    with mock.patch.object(model, "GPTModel", build):
        found = two_steps(folder, overrides)
    assert removed
    return found


@pytest.mark.parametrize(
    "experts", [{"parallel.expert": 2, "parallel.expert_tensor": 1}, {"parallel.expert_tensor": 2}]
)
def test_expert_weights_count_in_the_gradient_norm_without_the_mark_of_transformer_engine(
    folders: dict[str, Path], single: dict[str, Any], ranks: RankPool, experts: dict[str, int]
) -> None:
    layout = {"parallel.tensor": 2, "parallel.sequence": True, **experts}
    found = ranks.run(unmarked_steps, 2, folders["qwen3_moe"], layout)[0]
    for expected, step in zip(single["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    assert single["metrics"][0]["optimizer/grad_norm"] > 1  # clipped: a smaller norm makes another next loss


def one_right(vocab: int) -> list[ScoredGroup]:
    """`scored_groups` of which one response alone is taught."""
    first, *others = scored_groups(vocab)
    low = tuple(-1.0 for _ in first.advantages)
    return [
        dataclasses.replace(first, advantages=(1.0, *low[1:])),
        *(dataclasses.replace(scored, advantages=low) for scored in others),
    ]


def steps_of_one_right(folder: Path, overrides: dict[str, Any]) -> dict[str, Any] | None:
    with mock.patch.object(test_step, "scored_groups", one_right):
        return two_steps(folder, overrides)


def test_ranks_without_a_taught_response_run_their_experts_for_those_that_have_one(
    folders: dict[str, Path], ranks: RankPool
) -> None:
    folder = folders["qwen3_moe"]
    expected = ranks.run(steps_of_one_right, 1, folder, {})[0]
    found = ranks.run(steps_of_one_right, 2, folder, {"parallel.expert": 2})[0]
    for before, after in zip(expected["metrics"], found["metrics"], strict=True):
        assert after == pytest.approx(before, rel=2e-4, abs=2e-6)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_every_expert_and_router_learns(single: dict[str, Any]) -> None:
    assert sum(".experts." in name for name in single["gradients"]) == 2 * 4 * 3
    assert all(gradient.abs().max() > 0 for gradient in single["gradients"].values())
