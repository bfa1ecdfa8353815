"""A run with optimizer steps whose gradient is not finite: it goes on, or ends after so many in a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.runs import metrics, train, write_run
from tests.e2e.spoiling import VARIABLE


def test_skipped_steps_are_counted_over_calls_and_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimizer steps a rollout; a checkpoint after the second rollout, in the middle of three bad steps."""
    config, run = write_run(tmp_path, eval={"every": 0, "samples": 1}), tmp_path / "run"
    monkeypatch.setenv(VARIABLE, "3,4,5")
    for _ in range(2):  # the second call begins after one of them
        ended = train(config, "optimizer.skip_limit=3", program="tests.e2e.spoiling")
        assert ended.returncode == 2, ended.stderr[-3000:]
        assert "SkippedStepsError: optimizer step 5: found 3 consecutive steps" in ended.stderr
        assert "optimizer step 4: skipped, number 2 of 3 in a row" in ended.stderr
        manifest = json.loads((run / "checkpoints/step_00000002/manifest.json").read_text())
        assert manifest["skipped"] == 1
    done = train(config, "optimizer.skip_limit=4", program="tests.e2e.spoiling")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [record.get("optimizer/skipped") for record in metrics(run)] == [None, 0, 1, 2, 0]
    bad = metrics(run)[3]
    assert "optimizer/grad_norm" not in bad and bad["reward/mean"] >= 0, "what was not learned is not reported"
    prompts = (run / "prompts.jsonl").read_text().splitlines()
    assert len(prompts) == 4, "the data cursor moves on"


def test_before_the_first_step_that_is_taken_there_is_nothing_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = write_run(tmp_path, eval={"every": 0, "samples": 1}, checkpoint={"every": 1}), tmp_path / "run"
    monkeypatch.setenv(VARIABLE, "0,1,2")
    ended = train(config, "optimizer.skip_limit=3", program="tests.e2e.spoiling")
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert not list((run / "checkpoints").glob("step_*"))
    monkeypatch.setenv(VARIABLE, "0,1")
    done = train(config, program="tests.e2e.spoiling")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [record.get("optimizer/skipped") for record in metrics(run)] == [None, 2, 0, 0, 0]
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000003", "step_00000004"]
