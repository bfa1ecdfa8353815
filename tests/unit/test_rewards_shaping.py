"""Rewards between verifier and advantages: bounds, and the penalty for length."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from sdpg_megatron.checkpoint.prefetched_rollouts import PrefetchedRollouts
from sdpg_megatron.config import RewardConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.observe.metrics import merge
from sdpg_megatron.records import Completion, Group, Prompt, ScoredGroup
from sdpg_megatron.rewards.shaping import Shaping, overlong_penalty
from sdpg_megatron.train.collect import Collector
from sdpg_megatron.train.rollouts import describe, with_shaping
from tests.completions import make_completion

LIMIT = 20


def completion(length: int) -> Completion:
    return make_completion((5,) * length, (-1.0,) * length, "length" if length >= LIMIT else "stop", 0, "")


def group(rewards: tuple[float, ...], lengths: tuple[int, ...]) -> ScoredGroup:
    prompt = Prompt("test:1", (1, 2), (3, 1, 2), "answer")
    return ScoredGroup(Group(prompt, tuple(map(completion, lengths))), rewards, group_advantages(rewards))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0.0), (1, 0.0), (15, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (25, -1.0)],
)
def test_the_penalty_falls_linearly_over_the_buffer(length: int, expected: float) -> None:
    assert overlong_penalty(length, LIMIT, 4) == expected


def test_a_buffer_as_long_as_the_limit_and_one_of_a_token() -> None:
    assert [overlong_penalty(n, LIMIT, LIMIT) for n in (0, 5, 20)] == [0, -0.25, -1]
    assert [overlong_penalty(n, LIMIT, 1) for n in (18, 19, 20)] == [0, 0, -1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (3.0, -2.0, 0.5)),
        ({"clip": (0.0, 1.0)}, (1.0, 0.0, 0.5)),
        ({"overlong_buffer": 4}, (3.0, -2.5, -0.5)),
        ({"overlong_buffer": 4, "overlong_penalty": 0.2}, (3.0, -2.1, 0.3)),
        ({"clip": (0.0, 1.0), "overlong_buffer": 4}, (1.0, -0.5, -0.5)),  # the bounds are the verifier's alone
    ],
)
def test_advantages_are_those_of_shaped_rewards(config: dict[str, object], expected: tuple[float, ...]) -> None:
    given = group((3.0, -2.0, 0.5), (10, 18, 20))
    shaping = Shaping.build(RewardConfig.model_validate(config), LIMIT)
    assert shaping.shape(given.rewards, given.group.completions) == pytest.approx(expected)
    (shaped,) = with_shaping([given], shaping, partial(group_advantages, deviation="sample"))
    assert shaped.advantages == pytest.approx(group_advantages(expected, "sample"))
    assert (shaped.group, shaped.rewards) == (given.group, given.rewards)


@pytest.mark.parametrize("deviation", ["population", "sample", "none"])
def test_a_step_has_the_advantages_that_the_run_asks_for(deviation: Any) -> None:
    objective = {"advantage_deviation": deviation}
    tree = {"run_dir": "x", "steps": 10, "model": {"path": "m"}, "data": {}, "rollout": {"prompts_per_step": 1}}
    given, unread = group((1.0, 0.0, 0.0), (10, 11, 12)), cast(Any, None)
    config = parse({**tree, "objective": objective})
    collector = Collector(config, unread, unread, build_objective(config.objective, 10), unread)
    (kept,) = collector.collect(0, unread, PrefetchedRollouts((0,), (given,))).kept
    assert kept.advantages == group_advantages(given.rewards, deviation)


def test_what_was_done_is_reported() -> None:
    config = RewardConfig(clip=(0.0, 1.0), overlong_buffer=4)
    groups = [group((3.0, 1.0), (10, 18)), group((0.0, 1.0), (10, 20))]
    found = {name: metric.value for name, metric in describe(groups, Shaping.build(config, LIMIT)).items()}
    assert found["reward/mean"] == 5 / 4  # the verifier's
    assert found["reward/shaped"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert (found["reward/clipped"], found["reward/overlong"]) == (1 / 4, 2 / 4)
    assert found["reward/overlong_penalty"] == pytest.approx(-1.5 / 4)


def test_nothing_is_reported_where_nothing_is_done() -> None:
    found = describe([group((0.0, 1.0), (10, 20))], Shaping.build(RewardConfig(), LIMIT))
    assert not {name for name in found if name.startswith(("reward/shaped", "reward/clipped", "reward/overlong"))}


def test_the_stop_probability_is_that_of_the_tokens_that_ended_responses() -> None:
    prompt = Prompt("test:1", (1,), (1,), "")
    stopped = make_completion((5, 2), (-9.0, -0.5), "stop", 0, "")
    cut = make_completion((5, 6), (-9.0, -7.0), "length", 0, "")
    shaping = Shaping.build(RewardConfig(), LIMIT)
    scored = [ScoredGroup(Group(prompt, pair), (0.0, 0.0), (0.0, 0.0)) for pair in [(stopped, cut), (cut, cut)]]
    found = merge([describe(scored, shaping)])["rollout/stop_probability"]
    assert (found.value, found.weight) == (pytest.approx(0.60653066), 1)


def test_a_step_has_the_advantages_of_an_objective_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    given, unread = group((1.0, 0.0, 0.0), (10, 11, 12)), cast(Any, None)
    tree = {"run_dir": "x", "steps": 10, "model": {"path": "m"}, "data": {}, "rollout": {"prompts_per_step": 1}}
    config = parse({**tree, "objective": {"name": "examples.objectives.leave_one_out:LeaveOneOut"}})
    collector = Collector(config, unread, unread, build_objective(config.objective, 10), unread)
    (kept,) = collector.collect(0, unread, PrefetchedRollouts((0,), (given,))).kept
    assert kept.advantages == (1.0, -0.5, -0.5)
