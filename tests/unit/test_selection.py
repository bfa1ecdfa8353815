"""Which groups are left out, and how a step gets others instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from sdpg_megatron.config import SelectionConfig
from sdpg_megatron.errors import ConfigError, FilterError
from sdpg_megatron.observe.metrics import Reduction
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from sdpg_megatron.rewards.filters import equal_rewards, is_kept, load_filters
from sdpg_megatron.train.selection import GroupFilterChain, Selection, select
from tests.completions import make_completion

LIVE, RIGHT, WRONG = (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)


def group(number: int, rewards: tuple[float, ...], advantages: tuple[float, ...] | None = None) -> ScoredGroup:
    completion = make_completion((5,), (-1.0,), "stop", 0, "")
    mean = sum(rewards) / len(rewards)
    found = tuple(reward - mean for reward in rewards) if advantages is None else advantages
    return ScoredGroup(Group(Prompt(f"test:{number}", (1,), (1,), ""), (completion,) * len(rewards)), rewards, found)


def run(rewards: Sequence[tuple[float, ...]], wanted: int, **config: object) -> tuple[Selection, list[tuple[int, int]]]:
    """A selection from prompts whose groups get these rewards, in turn, and what it asked for."""
    selection = SelectionConfig.model_validate(config)
    filter_chain = GroupFilterChain(selection, ranks=None)  # type: ignore[arg-type]  # without filters no rank is asked
    cursor: Iterator[int] = iter(range(1000))
    calls: list[tuple[int, int]] = []

    def ask(count: int, number: int) -> list[ScoredGroup]:
        calls.append((count, number))
        return [group(n, rewards[n % len(rewards)]) for _, n in zip(range(count), cursor, strict=False)]

    return select(ask, wanted, filter_chain, selection), calls


def numbers(groups: Sequence[ScoredGroup]) -> list[int]:
    return [int(scored.group.prompt.uid.partition(":")[2]) for scored in groups]


def test_a_step_is_filled_with_further_prompts() -> None:
    found, calls = run([LIVE, RIGHT, WRONG, WRONG], 4, drop_dead=True)
    assert calls == [(4, 0), (3, 1), (2, 2), (1, 3), (1, 4), (1, 5), (1, 6)]
    assert numbers(found.kept) == [0, 4, 8, 12]
    assert numbers(found.generated) == list(range(13))
    assert found.dropped == {"right": 3, "wrong": 6, "level": 0, "surplus": 0}
    metrics = found.metrics()
    assert {name: metric.value for name, metric in metrics.items()} == {
        "selection/prompts": 13, "selection/kept": 4, "selection/rounds": 7, "selection/dropped_right": 3,
        "selection/dropped_wrong": 6, "selection/dropped_level": 0, "selection/dropped_surplus": 0,
    }  # fmt: skip
    assert {metric.reduction for metric in metrics.values()} == {Reduction.SUM}


def test_without_a_rule_the_first_round_is_the_step() -> None:
    found, calls = run([WRONG], 4)
    assert calls == [(4, 0)]
    assert numbers(found.kept) == [0, 1, 2, 3]


def test_the_bound_ends_it_with_what_there_is() -> None:
    found, calls = run([WRONG, WRONG, LIVE], 3, drop_dead=True, max_rounds=2)
    assert [number for _, number in calls] == [0, 1]
    assert numbers(found.kept) == [2]
    assert (found.rounds, len(found.generated)) == (2, 5)
    nothing, _ = run([RIGHT], 3, drop_dead=True, max_rounds=2)
    assert (nothing.kept, nothing.dropped["right"]) == ([], 6)


def test_oversampling_saves_rounds_and_leaves_out_what_is_too_much() -> None:
    found, calls = run([LIVE, WRONG], 4, drop_dead=True, oversample=1.5)
    assert calls == [(6, 0), (2, 1)]
    assert numbers(found.kept) == [0, 2, 4, 6]
    found, calls = run([LIVE], 4, drop_dead=True, oversample=1.5)
    assert calls == [(6, 0)]
    assert numbers(found.kept) == [0, 1, 2, 3]
    assert found.dropped["surplus"] == 2


@pytest.mark.parametrize(
    ("rewards", "advantages", "expected"),
    [
        ((0.0, 1.0), (-1.0, 1.0), None),
        ((1.0, 1.0), (0.0, 0.0), "right"),
        ((2.0, 2.0), (0.0, 0.0), "right"),
        ((0.0, 0.0), (0.0, 0.0), "wrong"),
        ((-1.0, -1.0), (0.0, 0.0), "wrong"),
        ((0.5, 0.5), (0.0, 0.0), "level"),
        ((0.0, 0.0), (-1.0, 1.0), "wrong"),  # apart by their lengths' penalty alone
        ((1.0, 3.0), (0.0, 0.0), "right"),  # equal once they were bounded
        ((-1.0, 2.0), (0.0, 0.0), "level"),
    ],
)
def test_equal_rewards(rewards: tuple[float, ...], advantages: tuple[float, ...], expected: str | None) -> None:
    assert equal_rewards(group(0, rewards, advantages)) == expected


FILTERS = """
import numpy
def short(group): return len(group.rewards) < 3
def fair(group): return numpy.mean(group.rewards) > 0.4
def broken(group): return group.reward > 0
def silent(group): len(group.rewards)
def counts(group): return len(group.rewards)
def slimes(args, samples, **kwargs): return True
async def later(group): return True
class Built:
    def __call__(self, group): return True
class Pair:
    def __call__(self, group, other): return True
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    (tmp_path / "my_filters.py").write_text(FILTERS)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: f"my_filters:{name}"


def test_filters_say_what_is_kept(module: Callable[[str], str]) -> None:
    filters = load_filters([module("short"), module("fair")])
    assert is_kept("", *load_filters([module("Built")]).values(), group(0, LIVE))
    said = {
        spec: [is_kept(spec, keeps, group(0, rewards)) for rewards in (LIVE, WRONG, (1.0, 1.0, 1.0))]
        for spec, keeps in filters.items()
    }
    assert said == {module("short"): [True, True, False], module("fair"): [True, False, True]}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("broken", ["AttributeError", "'reward'", "my_filters.py:5"]),
        ("silent", ["found None"]),
        ("counts", ["found 2"]),
    ],
)
def test_a_filter_that_does_not_say_is_an_error_that_names_it(
    module: Callable[[str], str], name: str, parts: list[str]
) -> None:
    ((spec, keeps),) = load_filters([module(name)]).items()
    with pytest.raises(FilterError) as caught:
        is_kept(spec, keeps, group(7, LIVE))
    for part in [*parts, f"selection.filters: my_filters:{name} on the group of test:7", "expected True or False"]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fair", r"selection\.filters: found 'fair', expected module:function"),
        ("nowhere_at_all:fair", "a module that imports"),
        ("my_filters:fare", "did you mean 'fair'"),
        ("my_filters:slimes", r"slimes\(args, samples, \*\*kwargs\)', expected f\(group\) -> bool"),
        ("my_filters:later", r"later\(group\)', expected f\(group\) -> bool"),
        ("my_filters:Pair", r"Pair\(group, other\)', expected f\(group\) -> bool"),
    ],
)
def test_a_filter_that_cannot_be_loaded_is_named(module: Callable[[str], str], spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_filters([spec])
