"""Experts that were recorded in rollout: the student's passes use them, with the router's own weights for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from sdpg_megatron.records import ScoredGroup
from tests.dist import test_step
from tests.dist.test_step import config_of, scored_groups, two_steps
from tests.pool import RankPool

VOCAB, LAYERS, EXPERTS, EXPERTS_PER_TOKEN = 300, 4, 4, 2
KINDS = {"qwen3_moe": ("qwen3_moe", True), "qwen3_moe_shares": ("qwen3_moe", False), "mixtral": ("mixtral", True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    root = tmp_path_factory.mktemp("moe")
    return {
        kind: write_tiny_model(root / kind, family, tied=False, seed=4, layers=LAYERS, normalized=normalized)
        for kind, (family, normalized) in KINDS.items()
    }


def recorded(vocab: int) -> list[ScoredGroup]:
    """`scored_groups` that came with experts which no router chose: drawn ones, two different for each token."""
    draw = np.random.default_rng(5)

    def drawn(tokens: int) -> Any:
        return draw.random((tokens, LAYERS, EXPERTS)).argsort(-1)[..., :EXPERTS_PER_TOKEN].astype(np.uint8)

    def of(scored: ScoredGroup) -> ScoredGroup:
        length = len(scored.group.prompt.student_tokens)
        completions = tuple(
            dataclasses.replace(completion, experts=drawn(length + len(completion.tokens) - 1))
            for completion in scored.group.completions
        )
        return dataclasses.replace(scored, group=dataclasses.replace(scored.group, completions=completions))

    return [of(scored) for scored in scored_groups(vocab)]


def replayed_steps(folder: Path, overrides: dict[str, Any]) -> dict[str, Any] | None:
    with mock.patch.object(test_step, "scored_groups", recorded):
        return two_steps(folder, overrides)


def logprobs(folder: Path, overrides: dict[str, Any], replays: bool) -> dict[tuple[int, ...], Tensor]:
    """Old log-probs of each response's tokens, by the tokens of prompt and response."""
    from sdpg_megatron import objectives
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.batching.collate import PackingLayout
    from sdpg_megatron.batching.micro_batches import Limit
    from sdpg_megatron.batching.samples import make_samples
    from sdpg_megatron.batching.step_batch import build_step
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.policy_trainer import PolicyTrainer

    config = config_of(folder, overrides)
    ranks = parallel.initialize(config.parallel, config.seed)
    objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
    policy_trainer = PolicyTrainer(config, read_architecture(folder), objective, ranks)
    groups = (recorded if replays else scored_groups)(VOCAB)
    batch = build_step(
        make_samples(groups, config.objective, distill_enabled=objective.distill_enabled),
        regularized=True,
        limit=Limit(3),
        layout=PackingLayout.of(config, ranks),
        device=policy_trainer.device,
    )
    found = {}
    for done in policy_trainer.with_old_logprobs(batch.micro_batches):
        assert done.old_logprobs_T is not None and done.student.sequence_BS is not None
        for number in range(done.student.count):
            tokens = done.student.tokens_BS[done.student.sequence_BS == number]
            found[tuple(tokens.tolist())] = done.old_logprobs_T[done.sequence_T == number]
    return found


def forced_logprobs(folder: Path) -> dict[tuple[int, ...], Tensor]:
    """The same by transformers, one sequence at a time, its routers' outputs replaced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    normalized = getattr(model.config, "norm_topk_prob", True)
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    given_TLK = torch.empty(0)

    def force(layer: int) -> Any:
        def hook(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            chosen_TK = given_TLK[:, layer].long()
            weights_TK = output[0].float().softmax(-1).gather(1, chosen_TK)
            if normalized:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            return output[0], weights_TK, chosen_TK

        return hook

    for layer, gate in enumerate(gates):
        gate.register_forward_hook(force(layer))
    found = {}
    for scored in recorded(VOCAB):
        for completion in scored.group.completions:
            tokens = (*scored.group.prompt.student_tokens, *completion.tokens.tolist())
            assert completion.experts is not None
            given_TLK = torch.from_numpy(completion.experts)
            with torch.no_grad():
                table_TV = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
            of_next = table_TV.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            found[tokens] = of_next[-len(completion.tokens) :]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_the_recorded_experts(folders: dict[str, Path], ranks: RankPool, kind: str) -> None:
    expected = forced_logprobs(folders[kind])
    found = ranks.run(logprobs, 1, folders[kind], {}, True)[0]
    own = ranks.run(logprobs, 1, folders[kind], {}, False)[0]
    assert found.keys() == expected.keys() == own.keys()
    for tokens, values in expected.items():
        torch.testing.assert_close(found[tokens], values, rtol=0, atol=1e-5)
    assert max((own[tokens] - values).abs().max().item() for tokens, values in expected.items()) > 1e-2


SP = {"parallel.tensor": 2, "parallel.sequence": True}
LOSSES = {"model.router_aux_loss": 0.7, "model.router_z_loss": 0.05}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "recompute_micro_batches_of_3": (1, {"model.recompute": True, "optimizer.micro_batch_size": 3}),
    "dp2": (2, {}),
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
def single(folders: dict[str, Path], ranks: RankPool) -> dict[str, Any]:
    return ranks.run(replayed_steps, 1, folders["qwen3_moe"], LOSSES)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_on_every_layout(
    folders: dict[str, Path], single: dict[str, Any], ranks: RankPool, layout: str
) -> None:
    world, overrides = LAYOUTS[layout]
    found = ranks.run(replayed_steps, world, folders["qwen3_moe"], {**LOSSES, **overrides})[0]
    for expected, step in zip(single["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
    for name, expected in single["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_replay_is_reported(folders: dict[str, Path], single: dict[str, Any], ranks: RankPool) -> None:
    """Of drawn pairs of four experts one in six is the router's own."""
    assert single["metrics"][0]["rollout/routing_difference"] == pytest.approx(5 / 6, abs=0.1)
    plain = ranks.run(two_steps, 1, folders["qwen3_moe"], LOSSES)[0]
    assert "rollout/routing_difference" not in plain["metrics"][0]
    assert plain["metrics"][0]["train/loss"] != pytest.approx(single["metrics"][0]["train/loss"], rel=0.01)
