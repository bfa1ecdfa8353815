"""Runs that leave out groups: steps that are filled again, that run out, and that are continued in the middle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import metrics, train, weights, write_run

LIVE_THIRD = {"verifier": "tests.e2e.selection:a_third_lives", "clip": [0.0, 0.9], "overlong_buffer": 4}
CHOSEN = {"drop_dead": True, "filters": ["tests.e2e.selection:without_zero"], "oversample": 1.5, "max_rounds": 30}
QUICK = ["data.eval=[]", "eval.every=0", "optimizer.warmup_steps=0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selected")
    config = write_run(folder, reward=LIVE_THIRD, selection=CHOSEN, checkpoint={"every": 1, "keep": 9})
    done = train(config, "steps=2", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "groups kept" not in done.stderr
    return folder


def test_every_step_is_filled(whole: Path) -> None:
    steps = metrics(whole / "run")
    assert [step["selection/kept"] for step in steps] == [4, 4]
    assert min(step["selection/rounds"] for step in steps) > 1
    for step in steps:
        left_out = sum(count for name, count in step.items() if name.startswith("selection/dropped_"))
        assert step["selection/prompts"] == 4 + left_out
        assert step["reward/dead_groups"] == pytest.approx(
            sum(step[f"selection/dropped_{reason}"] for reason in ("right", "wrong", "level"))
            / step["selection/prompts"]
        )
        assert 0 < step["distill/gate_rate"] < 1
        assert step["reward/overlong_penalty"] < 0


def test_a_run_continues_in_the_middle_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    for name in ("checkpoints/step_00000002", "model"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    done = train(whole / "run.yaml", "steps=2", *QUICK, f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    assert "continuing after step 1" in done.stdout
    assert metrics(run) == metrics(whole / "run")
    expected, found = weights(whole / "run"), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_step_goes_on_with_what_it_has(tmp_path: Path) -> None:
    """Of prompts 0 to 3, 4 to 7, and 8 and 0 to 2 one, one and none are left, for two mini-batches."""
    chosen = {"drop_dead": True, "filters": ["tests.e2e.selection:without_zero"], "max_rounds": 1}
    done = train(write_run(tmp_path, reward=LIVE_THIRD, selection=chosen), "steps=3", "data.shuffle=false", *QUICK)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "run")
    assert [step["selection/kept"] for step in steps] == [1, 1, 0]
    assert [step["optimizer/grad_norm"] > 0 for step in steps] == [True, True, False]
    warning = "step 0: 1 of 4 groups kept after 4 prompts in 1 rounds, dropped: 1 right, 1 wrong, 1 without_zero"
    assert warning in done.stderr
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_an_entropy_bonus_teaches_where_nothing_else_does(tmp_path: Path) -> None:
    """Without it, samples of dead groups are left out of a step that has no reference term."""
    config = write_run(
        tmp_path,
        reward={"verifier": "tests.e2e.selection:nothing_lives"},
        objective={"beta": 0.0, "alpha": 0.0, "entropy_coefficient": 0.1},
    )
    done = train(config, "steps=1", *QUICK)
    assert done.returncode == 0, done.stderr
    (step,) = metrics(tmp_path / "run")
    assert step["optimizer/grad_norm"] > 0
    assert step["train/loss"] == pytest.approx(-0.1 * step["train/entropy"])
