"""A rank does not come along: within a bound the others say which one it is, and where it was, and the job ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdpg_megatron.runtime.watchdog import HUNG
from tests.e2e.hanging import VARIABLE
from tests.e2e.runs import train, train_with_lost_rank, write_run

RANKS = 2

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks of a process that must not look for a GPU")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path, eval={"every": 0, "samples": 1}, checkpoint={"every": 0, "export": False})


@pytest.mark.parametrize(
    ("how", "lost", "phase", "found"),
    [
        ("stop", 1, "update", "no heartbeat from rank 1 for 10 s"),
        # the first rank has the store, whose thread does not need Python's lock; then, it has, and is stopped
        ("hold", 0, "update", "no heartbeat from rank 0 for 10 s"),
        ("stop", 0, "eval", "the first rank's machine has not answered for 10 s"),
        ("die", 1, "update", "a collective has failed in update"),
    ],
    ids=["stopped", "holds_the_lock", "first_is_stopped", "dead"],
)
def test_a_rank_that_is_silent_is_named_by_the_others(
    config: Path, monkeypatch: pytest.MonkeyPatch, how: str, lost: int, phase: str, found: str
) -> None:
    monkeypatch.setenv(VARIABLE, f"{how}:{lost}:{phase}")
    ends = train_with_lost_rank(config, "watchdog.silence=10", ranks=RANKS, program="tests.e2e.hanging", lost=lost)
    assert ends[lost][0] == -9
    for rank in {*range(RANKS)} - {lost}:
        code, told = ends[rank]
        assert code == HUNG, told[-3000:]
        assert f"watchdog, rank {rank} of {RANKS}, process " in told
        assert found in told, told[-3000:]
        assert f"missing: rank {lost}\n  rank {lost} (process " in told
        assert "silent for " in told and f"last known status): {phase} for " in told
        assert "hanging.py" in told, "its last place"
        assert 'train/loop.py", line ' in told, "a stack of its own"
    if how == "hold":
        assert "Timeout (0:00:10)!" in ends[lost][1] and 'hanging.py", line' in ends[lost][1]


def test_a_phase_that_takes_too_long_ends_with_the_rank_that_is_busy(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sleep:1:eval")
    bounds = "watchdog.eval=18", "watchdog.silence=10"
    ends = train_with_lost_rank(config, *bounds, ranks=RANKS, program="tests.e2e.hanging", lost=1)
    for rank, (code, told) in enumerate(ends):
        assert code == HUNG, told[-3000:]
        assert "eval has taken " in told and "watchdog.eval allows 18 s. The stacks of this rank's threads:" in told
        assert f"watchdog, rank {rank} of {RANKS}, process " in told
        assert "missing: rank 1\n  rank 1 (process " in told, told[-3000:]
        assert "in no collective: " in told and "hang_here (hanging.py" in told
        assert "  rank 0: eval for " in told
    assert 'hanging.py", line' in ends[1][1] and "in hang_here" in ends[1][1]


def test_ranks_that_have_not_met_end_as_well(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sleep:1:start")
    bounds = "watchdog.start=12", "watchdog.silence=10"
    ends = train_with_lost_rank(config, *bounds, ranks=RANKS, program="tests.e2e.hanging", lost=1)
    for rank, (code, told) in enumerate(ends):
        assert code == HUNG, told[-3000:]
        assert f"watchdog, rank {rank} of {RANKS}, process " in told
        assert f"s on rank {rank}, watchdog.start allows 12 s. The stacks of this rank's threads:" in told
    assert "in hang_here" in ends[1][1] and "in hang_here" not in ends[0][1]


def test_a_rank_alone_ends_as_well(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sleep:0:update")
    done = train(config, "watchdog.update=6", "watchdog.silence=10", program="tests.e2e.hanging")
    assert done.returncode == HUNG
    assert "update has taken " in done.stderr and "in hang_here" in done.stderr
