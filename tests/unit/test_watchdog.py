"""Who is missing, from what the ranks said last."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from sdpg_megatron.config import WatchdogConfig
from sdpg_megatron.process.rank_environment import name_ranks
from sdpg_megatron.runtime.heartbeats import Clock
from sdpg_megatron.runtime.rank_status import RankStatus, describe, find_missing, locate_main_thread
from sdpg_megatron.runtime.watchdog import BETWEEN

ROOT = Path(__file__).parents[2]


def at(
    phase: str = "update", number: int = 4, waits: bool = True, ended: str = "", process: str = "process 7"
) -> RankStatus:
    place = "gather_all (parallel.py:1)" if waits else "work (x.py:2)"
    return RankStatus(
        sequence=1, phase=phase, number=number, seconds=9.6, place=place, waits=waits, process=process, ended=ended
    )


def test_the_silent_come_first_then_those_behind_then_the_busy() -> None:
    states = {0: at(), 1: at(waits=False), 2: at("rollout", 3), 3: at()}
    assert find_missing(states, [3]) == [3]
    assert find_missing(states, []) == [2]
    assert find_missing({**states, 2: at()}, []) == [1]
    assert find_missing({rank: at() for rank in range(3)}, []) == []
    assert find_missing({rank: at(waits=False) for rank in range(3)}, []) == []


def test_a_description_has_a_line_for_each_place() -> None:
    states = {rank: at() for rank in range(6)} | {2: at("rollout", 3, waits=False), 4: at(ended="ValueError: no")}
    assert describe(states, {}).splitlines() == [
        "missing: rank 2",
        "  rank 2 (process 7): rollout for 10 s, in no collective: work (x.py:2)",
        "  rank 4: ended in update: ValueError: no",
        "  ranks 0-1, 3, 5: update for 10 s, in a collective: gather_all (parallel.py:1)",
    ]
    silent = describe(states, {0: 30.4, 5: 31.0})
    assert silent.startswith("missing: ranks 0, 5\n  rank 0 (process 7; silent for 30 s, last known status): update")
    assert describe({0: at(), 1: at()}, {}).startswith("missing: undetermined")
    assert describe({}, {}) == "nothing is known of the ranks"


def test_ranks_are_named_in_spans() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([5, 0, 1, 2, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_the_place_of_this_thread() -> None:
    place, waits = locate_main_thread()
    assert "locate_main_thread (rank_status.py:" in place and not waits


def test_time_in_which_a_process_was_stopped_does_not_count() -> None:
    clock = Clock(longest=0.2)
    before = clock.now()
    time.sleep(0.1)
    clock.tick()
    assert clock.now() - before == pytest.approx(0.1, abs=0.09)
    time.sleep(0.5)
    clock.tick()
    assert clock.now() - before < 0.4


def test_every_phase_has_a_bound() -> None:
    sources = (path.read_text() for path in (ROOT / "sdpg_megatron" / "train").glob("*.py"))
    phases = {found for source in sources for found in re.findall(r'phases\("(\w+)"\)', source)}
    assert {"rollout", "update", "publish", "checkpoint", "finish"} <= phases
    bounds = WatchdogConfig.model_fields.keys() - {"enabled", "silence"}
    assert phases | {"start", BETWEEN} == bounds
