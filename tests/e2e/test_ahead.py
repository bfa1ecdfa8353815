"""Generation one step ahead of training, from the command line: what it learns from, and that a run goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdpg_megatron.checkpoint.prefetched_rollouts import PREFETCHED
from sdpg_megatron.checkpoint.state import checkpoint_name
from tests.e2e.runs import contents, metrics, train, weights, write_run
from tests.e2e.stopping_at import VARIABLE

AHEAD = ["rollout.ahead=1", "objective.correction=truncate"]
DRAWS = ("reward/mean", "rollout/length", "rollout/stop_probability")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("ahead")
    done = train(write_run(folder), *AHEAD)
    assert done.returncode == 0, done.stderr
    return folder


def test_responses_are_one_step_old_but_for_the_first(whole: Path) -> None:
    steps = metrics(whole / "run")[1:]
    assert [step["rollout/staleness"] for step in steps] == [0, 1, 1, 1]
    assert steps[0]["rollout/logprob_diff_max"] < 1e-4
    assert all(step["rollout/logprob_diff_max"] > 1e-3 for step in steps[1:]), "of other weights, at this learning rate"
    assert all(step["rollout/effective_sample_size"] < 1 for step in steps[1:])


def test_weights_that_stay_draw_what_they_draw_without(tmp_path: Path) -> None:
    """The same prompts, seeds and responses; only when they are generated differs."""
    runs = []
    for name, more in (("ahead", ["rollout.ahead=1"]), ("plain", [])):
        (tmp_path / name).mkdir()
        config = write_run(tmp_path / name, eval={"every": 0, "samples": 1}, checkpoint={"every": 0, "export": False})
        done = train(config, *more, "objective.correction=truncate", "optimizer.lr=1.0e-30")
        assert done.returncode == 0, done.stderr
        drawn = [[step.get(name) for name in DRAWS] for step in metrics(tmp_path / name / "run")[1:]]
        runs.append((drawn, (tmp_path / name / "run" / "prompts.jsonl").read_text()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("place", "newest"), [("prepare:1", 1), ("update:2", 3)], ids=["before", "after"])
def test_a_run_that_is_stopped_while_both_are_under_way_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, newest: int
) -> None:
    config, run = write_run(tmp_path), tmp_path / "run"
    monkeypatch.setenv(VARIABLE, place)
    stopped = train(config, *AHEAD, program="tests.e2e.stopping_at")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert f"stopped after step {newest}" in stopped.stdout
    assert (run / "checkpoints" / checkpoint_name(newest) / PREFETCHED).exists()
    done = train(config, *AHEAD)
    assert done.returncode == 0, done.stderr
    assert metrics(run) == metrics(whole / "run")
    assert (run / "prompts.jsonl").read_text() == (whole / "run" / "prompts.jsonl").read_text()
    assert contents(run / "rollouts") == contents(whole / "run" / "rollouts")
    expected, found = weights(whole / "run"), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_was_generated_under_other_settings_is_generated_again(whole: Path, tmp_path: Path) -> None:
    """For the same prompts, from the weights of the moment."""
    changes = [
        f"run_dir={tmp_path / 'run'}",
        "rollout.max_response_tokens=5",
        "steps=3",
        "data.eval=[]",
        "eval.every=0",
    ]
    done = train(whole / "run.yaml", *AHEAD, *changes, "--branch-from", f"{whole / 'run'}@2")
    assert done.returncode == 0, done.stderr
    (step,) = metrics(tmp_path / "run")
    assert (step["rollout/staleness"], step["rollout/length_max"]) == (0, 5)
    prompts = (whole / "run" / "prompts.jsonl").read_text().splitlines()
    assert (tmp_path / "run" / "prompts.jsonl").read_text().splitlines() == [prompts[2]]
