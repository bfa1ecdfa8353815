"""A run that is extended, changed and branched, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpg_megatron.checkpoint.state import RunState, complete_checkpoints, newest_checkpoint, step_of
from sdpg_megatron.cli import main
from sdpg_megatron.train.run_dir import FILES, FOLDERS
from tests.e2e.runs import metrics, train, weights, write_run
from tests.e2e.stopping_at import VARIABLE as STOP_AT

FIXED = ["optimizer.schedule=constant", "eval.every=0", "data.eval=[]", "checkpoint.keep=9"]
"""No schedule depends on where the run ends, and no record does."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps, with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(write_run(folder), *FIXED)
    assert done.returncode == 0, done.stderr
    return folder


def new_run(folder: Path, whole: Path) -> list[object]:
    """Arguments of a run in `folder` on the same model and data as `whole`."""
    return [whole / "run.yaml", *FIXED, f"run_dir={folder / 'run'}"]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def manifest(run: Path) -> RunState:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    return newest[1]


def test_an_extended_run_is_one_that_was_longer_from_the_start(whole: Path, tmp_path: Path) -> None:
    arguments, run = new_run(tmp_path, whole), tmp_path / "run"
    short = train(*arguments, "steps=2")
    assert short.returncode == 0, short.stderr
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert {path.name for path in run.iterdir()} <= {*FOLDERS, *FILES}
    refused = train(*arguments, "steps=2", "optimizer.lr=2e-3")
    assert refused.returncode == 2
    assert "optimizer.lr: found 0.002, expected 0.001" in refused.stderr and "raise steps, now 2" in refused.stderr

    extended = train(*arguments)
    assert extended.returncode == 0, extended.stderr
    assert "changed since the checkpoint: steps: 2 -> 4" in extended.stdout
    assert metrics(run) == metrics(whole / "run")
    assert (run / "prompts.jsonl").read_text() == (whole / "run" / "prompts.jsonl").read_text()
    assert_same_weights(whole / "run", run)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    change = {"step": 2, "field": "steps", "old": 2, "new": 4}
    assert [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()] == [change]
    assert [vars_of(one) for one in manifest(run).changes] == [change]


def vars_of(change: Any) -> dict[str, Any]:
    return {name: getattr(change, name) for name in ("step", "field", "old", "new")}


@pytest.fixture(scope="module")
def branch(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A branch from the second step of that run, under the same configuration, stopped in its first step."""
    folder = tmp_path_factory.mktemp("branch")
    arguments = [*new_run(folder, whole), "--branch-from", f"{whole / 'run'}@2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STOP_AT, "prepare:2")
        stopped = train(*arguments, program="tests.e2e.stopping_at")
    assert stopped.returncode == 75, stopped.stderr
    assert f"a branch of {whole / 'run'}@2, with its data cursor and its reference" in stopped.stdout
    continued = train(*arguments)
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step 2" in continued.stdout
    return folder


def without_alarms(run: Path) -> list[dict[str, float]]:
    """Metrics but for alarms, which compare a step with those before it in the same folder."""
    return [{name: value for name, value in step.items() if "alarm/" not in name} for step in metrics(run)]


def test_a_branch_without_a_change_is_the_run_itself(whole: Path, branch: Path) -> None:
    """Weights, the optimizer's moments, the data cursor and the reference are those of the other run, bit for bit."""
    assert without_alarms(branch / "run") == without_alarms(whole / "run")[-2:]
    assert metrics(branch / "run")[0]["reference/kl"] > 0
    assert_same_weights(whole / "run", branch / "run")
    prompts = (whole / "run" / "prompts.jsonl").read_text().splitlines()
    assert (branch / "run" / "prompts.jsonl").read_text().splitlines() == prompts[-2:]
    assert [step_of(path) for path in complete_checkpoints(branch / "run" / "checkpoints")] == [2, 4]


def test_a_branch_of_it_on_other_data_and_ranks_with_another_method(
    whole: Path, branch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"What is {n} - 1?", "answer": str(n - 1)} for n in range(5)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        "steps=5", f"data.train=[{tmp_path / 'other.jsonl'}]", "rollout.group_size=2", "objective.name=opcd",
        "objective.teacher=ema", "optimizer.lr=5e-4", "optimizer.minibatches=1", "parallel.tensor=2",
        f"model.path={branch / 'run' / 'model'}", "--new-reference",
    ]  # fmt: skip
    done = train(*new_run(tmp_path, whole), *changes, "--branch-from", branch / "run", ranks=2)
    assert done.returncode == 0, done.stderr
    state = manifest(tmp_path / "run")
    assert [(point.run, point.step) for point in state.branches] == [(f"{whole / 'run'}", 2), (f"{branch / 'run'}", 4)]
    assert {change.field for change in state.changes} >= {
        "steps", "prompts", "rollout.group_size", "objective.name", "objective.teacher", "optimizer.lr",
        "optimizer.minibatches", "parallel.tensor", "reference",
    }  # fmt: skip
    (step,) = metrics(tmp_path / "run")
    assert step["step"] == 5 and step["optimizer/lr"] == 5e-4
    assert step["reference/kl"] == pytest.approx(0, abs=1e-6)  # it is where the branch starts
    assert main(["inspect", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert f"branched from  {branch / 'run'}@4" in shown
    assert "change         step 4: rollout.group_size: 4 -> 2" in shown


def test_a_dry_run_says_whether_a_run_can_go_on(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = train(*new_run(whole, whole), "steps=9", "--dry-run")
    assert checked.returncode == 0, checked.stderr
    assert "continuing after step 4\nchanged since the checkpoint: steps: 4 -> 9" in checked.stderr
    refused = train(*new_run(whole, whole), "seed=1", "--dry-run")
    assert refused.returncode == 2
    assert "seed: found 1, expected 0, as the run was started" in refused.stderr
    missing = train(*new_run(tmp_path, whole), "--dry-run", "--branch-from", f"{whole / 'run'}@3")
    assert missing.returncode == 2
    assert "expected one of its checkpoints: @2, @4" in missing.stderr
    damaged = next(path for path in (whole / "run" / "checkpoints").glob("step_00000004/**/*.distcp"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        for arguments in (new_run(whole, whole), [*new_run(tmp_path, whole), "--branch-from", f"{whole / 'run'}@4"]):
            broken = train(*arguments, "steps=9", "--dry-run")
            assert broken.returncode == 2
            assert f"{damaged.name}: found" in broken.stderr and "Fix: restore the file" in broken.stderr
        (whole / "run" / "summary.json").rename(tmp_path / "summary.json")  # the checkpoint is what is evaluated now
        held_out = f"data.eval=[{whole / 'eval.jsonl'}]"
        assert main(["eval", str(whole / "run"), held_out, "--dry-run", "--out", str(tmp_path / "out")]) == 2
        assert f"{damaged.name}: found" in capsys.readouterr().err
        (tmp_path / "summary.json").rename(whole / "run" / "summary.json")
    finally:
        damaged.write_bytes(content)
    assert not (tmp_path / "out").exists()
    alone = train(*new_run(tmp_path, whole), "--new-reference")
    assert alone.returncode == 2 and "--branch-from as well" in alone.stderr
