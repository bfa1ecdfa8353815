"""Two training steps give the same loss, metrics and weights however they are spread: every two settings, together.

Against a single process with micro-batches of four packed sequences, for a dense model and for a mixture of experts.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_step import two_steps
from tests.pool import RankPool

Case = dict[str, Any]

RANKS = 4
FACTORS: dict[str, tuple[Any, ...]] = {
    "parallel.tensor": (1, 2),
    "parallel.sequence": (False, True),
    "parallel.pipeline": (1, 2),
    "parallel.virtual_pipeline": (None, 2),
    "parallel.context": (1, 2),
    "data": (1, 2),
    "model.packed": (True, False),
    "model.recompute": (False, True),
    "micro": ("one sequence", "60 tokens", "all"),
}
MICRO: dict[str, Case] = {
    "one sequence": {"optimizer.micro_batch_size": 1},
    "60 tokens": {"optimizer.micro_batch_tokens": 60},
    "all": {"optimizer.micro_batch_size": 64},
}
EXPERTS = {"parallel.expert": (1, 2), "parallel.expert_tensor": (1, 2)}


def world_of(case: Case) -> int:
    world: int = case["parallel.tensor"] * case["parallel.pipeline"] * case["parallel.context"] * case["data"]
    return world


def possible(case: Case) -> bool:
    """Few enough ranks, and nothing that the configuration's checks refuse."""
    if case["parallel.virtual_pipeline"] and case["parallel.pipeline"] == 1:
        return False
    if case["parallel.sequence"] and case["parallel.tensor"] == 1:
        return False
    if not case["model.packed"] and (case["parallel.context"] > 1 or case["micro"] == "60 tokens"):
        return False
    if "parallel.expert" in case:
        if case["parallel.tensor"] > 1 and not case["parallel.sequence"]:
            return False
        if world_of(case) % (case["parallel.expert"] * case["parallel.expert_tensor"] * case["parallel.pipeline"]):
            return False
    return world_of(case) <= RANKS


def pairs(case: Case) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(case.items(), 2))


def covering(factors: dict[str, tuple[Any, ...]]) -> list[Case]:
    """Cases in which every possible pair of settings occurs: each next one has as many new pairs as any."""
    cases = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    cases = [case for case in cases if possible(case)]
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def name(case: Case) -> str:
    set_apart = {key: value for key, value in case.items() if value != FACTORS.get(key, (1,))[0] or key == "micro"}
    return ",".join(f"{key.split('.')[-1]}={value}" for key, value in set_apart.items()).replace(" ", "_")


DENSE, MOE = covering(FACTORS), covering({**FACTORS, **EXPERTS})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    root = tmp_path_factory.mktemp("models")
    return {
        "dense": write_tiny_model(root / "dense", "qwen3", tied=True, seed=3),
        "moe": write_tiny_model(root / "moe", "qwen3_moe", tied=False, seed=2),
    }


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], ranks: RankPool) -> dict[str, dict[str, Any]]:
    return {kind: ranks.run(two_steps, 1, folder, {})[0] for kind, folder in folders.items()}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, id=f"{kind}-{name(case)}")
        for kind, cases in (("dense", DENSE), ("moe", MOE))
        for case in cases
    ],
)
def test_a_step_is_the_same_however_it_is_spread(
    folders: dict[str, Path], alone: dict[str, dict[str, Any]], ranks: RankPool, kind: str, case: Case
) -> None:
    fields = {key: value for key, value in case.items() if "." in key}
    found = ranks.run(two_steps, world_of(case), folders[kind], {**fields, **MICRO[case["micro"]]})[0]
    expected = alone[kind]
    for theirs, step in zip(expected["metrics"], found["metrics"], strict=True):
        assert step == pytest.approx(theirs, rel=2e-4, abs=2e-6)
    # A sharded optimizer leaves each data- or context-parallel rank its own part of the summed gradient alone.
    whole = case["parallel.context"] == case["data"] == 1 and kind == "dense"
    for part in ("weights", "gradients") if whole else ("weights",):
        assert expected[part].keys() == found[part].keys()
        for tensor, theirs in expected[part].items():
            torch.testing.assert_close(
                found[part][tensor], theirs, rtol=1e-4, atol=1e-6, msg=lambda m, n=tensor: f"{n}: {m}"
            )


APART = {
    (("parallel.tensor", 1), ("parallel.sequence", True)),
    (("parallel.pipeline", 1), ("parallel.virtual_pipeline", 2)),
    (("parallel.context", 2), ("model.packed", False)),
    (("model.packed", False), ("micro", "60 tokens")),
}
"""What excludes each other."""


@pytest.mark.parametrize(
    ("cases", "factors", "apart"),
    [
        (DENSE, FACTORS, APART),
        (MOE, {**FACTORS, **EXPERTS}, APART | {(("parallel.tensor", 2), ("parallel.sequence", False))}),
    ],
    ids=["dense", "moe"],
)
def test_every_two_settings_meet(cases: list[Case], factors: dict[str, Any], apart: set[Any]) -> None:
    every = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    assert set().union(*map(pairs, every)) - set().union(*map(pairs, cases)) == apart
    assert 8 < len(cases) < 25
