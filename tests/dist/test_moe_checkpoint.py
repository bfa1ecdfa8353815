"""Checkpoints of a mixture of experts go on under any layout of its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.testing import assert_close

from tests.dist.test_checkpoint import state_at, store_of, whole_weights
from tests.dist.test_teachers import start
from tests.pool import RankPool

EMA = {"objective.teacher": "ema", "objective.teacher_ema": 0.3}
SP = {"parallel.tensor": 2, "parallel.sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ep2": (2, {"parallel.expert": 2}),
    "tp2_whole_experts": (2, {**SP, "parallel.expert_tensor": 1}),
    "ep2_tp2": (4, {**SP, "parallel.expert": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    return write_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", tied=True, seed=3, layers=2)


def save_and_go_on(model: Path, folder: Path, overrides: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """A checkpoint after the first step; divergences and weights of the second."""
    run = start(model, {**EMA, **overrides})
    run.step(0)
    store = store_of(run, folder)
    store.save(run.policy_trainer, state_at(1))
    store.finish()
    return run.step(1), whole_weights(run)


def load_and_go_on(model: Path, folder: Path, overrides: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    run = start(model, {**EMA, **overrides})
    store = store_of(run, folder)
    path, state = store.newest()
    store.load(path, state, run.policy_trainer)
    return run.step(1), whole_weights(run)


@pytest.mark.parametrize(("written", "read"), [("ep2", "tp2_whole_experts"), ("ep2_tp2", "one")])
def test_another_layout_goes_on_to_rounding(
    model: Path, tmp_path: Path, ranks: RankPool, written: str, read: str
) -> None:
    """Experts and routers with their moments, and the teacher's own."""
    expected, weights = ranks.run(save_and_go_on, LAYOUTS[written][0], model, tmp_path, LAYOUTS[written][1])[0]
    found, resumed = ranks.run(load_and_go_on, LAYOUTS[read][0], model, tmp_path, LAYOUTS[read][1])[0]
    assert found == pytest.approx(expected, rel=2e-4)
    assert weights.keys() == resumed.keys()
    for name, weight in weights.items():
        assert_close(resumed[name], weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
