"""pass@k, majority@k and intervals against counts over every subset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdpg_megatron.evaluation.estimators import best_at, bootstrap, draw_sizes, majority_at

ANSWERS = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.sampled_from([0.0, 1.0, 0.25])), min_size=1, max_size=9
)


def vote(subset: Sequence[tuple[str | None, float]], everything: Sequence[tuple[str | None, float]]) -> float:
    """The reward of a vote among `subset`, as one would count by hand."""
    counts = Counter(answer for answer, _ in subset if answer is not None)
    if not counts:
        return 0.0
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    worth = [np.mean([reward for answer, reward in everything if answer == winner]) for winner in winners]
    return float(np.mean(worth))


@given(st.lists(st.sampled_from([0.0, 1.0, 0.5, -0.5]), min_size=1, max_size=9), st.data())
def test_best_is_the_mean_over_all_subsets(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    expected = np.mean([max(subset) for subset in combinations(rewards, k)])
    assert best_at(rewards, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 5, 32])
def test_with_rewards_of_0_and_1_it_is_the_usual_estimator(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            rewards = [1.0] * right + [0.0] * (n - right)
            assert best_at(rewards, k) == (comb(n, k) - comb(n - right, k)) / comb(n, k)


def test_it_is_exact_where_factorials_are_beyond_floats() -> None:
    assert best_at([1.0] + [0.0] * 4095, 4096) == 1.0
    assert best_at([1.0] + [0.0] * 4095, 2048) == 0.5
    assert best_at([1.0] * 4096, 7) == 1.0


@given(ANSWERS, st.data())
def test_majority_is_the_mean_over_all_subsets(pairs: list[tuple[str | None, float]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(pairs)))
    expected = np.mean([vote([pairs[i] for i in chosen], pairs) for chosen in combinations(range(len(pairs)), k)])
    answers, rewards = zip(*pairs, strict=True)
    assert majority_at(answers, rewards, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "rewards", "k", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 3, 1.0),
        (["7", "8", "8"], [1, 0, 0], 3, 0.0),
        (["7", "8"], [1, 0], 2, 0.5),  # a tie is shared
        (["7", None, None, None], [1, 0, 0, 0], 4, 1.0),  # who says nothing has no vote
        ([None, None], [0, 0], 2, 0.0),
        ([None, None], [1, 1], 2, 0.0),
        (["7", None], [1, 0], 1, 0.5),
    ],
)
def test_votes_one_can_count(answers: list[str | None], rewards: list[float], k: int, expected: float) -> None:
    assert majority_at(answers, rewards, k) == pytest.approx(expected, abs=1e-15)


def test_majority_of_many_samples_is_a_number() -> None:
    """C(20000, 120) is beyond floats."""
    answers, rewards = ["7"] * 19800 + ["8"] * 200, [1.0] * 19800 + [0.0] * 200
    with pytest.raises(OverflowError):
        float(comb(20000, 120))
    assert majority_at(answers, rewards, 1) == pytest.approx(0.99, abs=1e-12)
    assert majority_at(answers, rewards, 120) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("k", [0, 3])
def test_more_responses_than_there_are_is_an_error(k: int) -> None:
    for function in (lambda: best_at([1.0, 0.0], k), lambda: majority_at(["1", "2"], [1.0, 0.0], k)):
        with pytest.raises(ValueError, match=f"{k} of 2 responses"):
            function()


@pytest.mark.parametrize(
    ("samples", "sizes"), [(1, (1,)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (32, (1, 2, 4, 8, 16, 32))]
)
def test_draw_sizes(samples: int, sizes: tuple[int, ...]) -> None:
    assert draw_sizes(samples) == sizes


def test_the_interval_is_that_of_the_mean_over_problems() -> None:
    values_PM = np.array([[i % 2, 3.0] for i in range(400)])
    rate, constant = bootstrap(values_PM, seed=1)
    assert (constant.value, constant.low, constant.high) == (3.0, 3.0, 3.0)
    error = 1.96 * 0.5 / 20
    assert rate.value == 0.5
    assert (rate.low, rate.high) == (pytest.approx(0.5 - error, abs=0.006), pytest.approx(0.5 + error, abs=0.006))


def test_the_interval_follows_from_the_seed_and_not_from_other_columns() -> None:
    values_PM = np.random.RandomState(5).rand(30, 3)
    together = bootstrap(values_PM, seed=2)
    (alone,) = bootstrap(values_PM[:, 1:2], seed=2)
    assert (alone.low, alone.high) == pytest.approx((together[1].low, together[1].high), abs=1e-12)
    assert bootstrap(values_PM, seed=3)[0].low != together[0].low


def test_a_run_of_any_seed_can_be_resampled() -> None:
    """NumPy's seeds have 32 bits, a run's 63."""
    values_PM = np.geomspace(1, 1000, 40)[:, None]
    found = [bootstrap(values_PM, seed=seed)[0] for seed in (2**63 - 1, 2**32 - 1, 5, 2**32 + 5)]
    assert found[0] == found[1] != found[2] == found[3]
