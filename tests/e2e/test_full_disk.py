"""A disk that refuses what a run writes beside its checkpoints: one error, and the run goes on when there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdpg_megatron.checkpoint.state import complete_checkpoints, step_of
from tests.e2e.refusing import VARIABLE
from tests.e2e.runs import contents, metrics, train, weights, write_run

REFUSALS = (
    ("metrics.jsonl:5", "run/metrics.jsonl", 2),
    ("prompts.jsonl:2", "run/prompts.jsonl", 2),
    ("model:1", "run/model", 4),
    ("summary.json:2", "run/summary.json", 4),
)
"""What is refused, what the error names, and the step of the newest checkpoint then; one after another."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(write_run(folder))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_refused_again_and_again_a_run_ends_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = write_run(tmp_path), tmp_path / "run"
    for refusal, named, newest in REFUSALS:
        monkeypatch.setenv(VARIABLE, refusal)
        call = train(config, program="tests.e2e.refusing")
        assert call.returncode == 2, call.stderr[-3000:]
        assert f"WriteError: {tmp_path / named}: could not be written: " in call.stderr
        assert "Traceback" not in call.stderr
        assert step_of(complete_checkpoints(run / "checkpoints")[-1]) == newest
    done = train(config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(run) == metrics(whole)
    assert (run / "prompts.jsonl").read_text() == (whole / "prompts.jsonl").read_text()
    assert contents(run / "rollouts") == contents(whole / "rollouts")
    expected, found = weights(whole), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("refusal", ["metrics.jsonl:3", "model:1"])
def test_every_rank_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    """Or the others would wait, and end with what their network says of the one that is gone."""
    monkeypatch.setenv(VARIABLE, refusal)
    call = train(write_run(tmp_path, steps=2), "parallel.pipeline=2", program="tests.e2e.refusing", ranks=2)
    assert call.returncode == 2, call.stderr[-3000:]
    assert "WriteError: " in call.stderr
    assert "Traceback" not in call.stderr
