"""Checkpoints of a mixture of experts go on under any layout of its experts."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.testing import assert_close

from tests.dist.test_teachers import Run, start
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


def store_of(run: Run, folder: Path) -> Any:
    from sdpg_megatron.checkpoint.store import CheckpointStore

    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False  # the pool's workers are; Python lets no daemon fork, as saving does
    return CheckpointStore(folder, run.ranks, run.config.checkpoint.keep)


def whole_weights(run: Run) -> dict[str, Tensor]:
    from sdpg_megatron.train.export import stream_weights

    buckets = stream_weights(run.config, run.learner)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def save_and_go_on(model: Path, folder: Path, overrides: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """A checkpoint after the first step; divergences and weights of the second."""
    from sdpg_megatron.checkpoint.state import RunState

    run = start(model, {**EMA, **overrides})
    run.step(0)
    state = RunState(step=1, cursor={}, seconds=0.0, baseline={}, evaluated=True, config={}, model="m")
    store_of(run, folder).save(run.learner, state)
    return run.step(1), whole_weights(run)


def load_and_go_on(model: Path, folder: Path, overrides: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    run = start(model, {**EMA, **overrides})
    store = store_of(run, folder)
    store.load(store.latest(), run.learner)
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
