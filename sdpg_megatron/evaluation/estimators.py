"""Estimators over n responses to each of P problems.

Shapes: P problems, M quantities, R bootstrap resamples, K number of responses drawn, V number of winning answers; 2 for
a chance and its product with the reward.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb, fsum

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
"""Number of bootstrap resamples."""
LEVEL = 0.95
"""Confidence level of the intervals."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over problems with its confidence interval."""

    value: float
    low: float
    high: float


def draw_sizes(samples: int) -> tuple[int, ...]:
    """Powers of two up to `samples`, and `samples` itself."""
    return tuple(sorted({1 << power for power in range(samples.bit_length())} | {samples}))


def best_at(rewards: Sequence[float], k: int) -> float:
    """Mean over all subsets of `k` responses of the best reward in the subset.

    With c rewards of 1 among n and the others 0 this is 1 - C(n-c, k) / C(n, k), the unbiased estimator of pass@k (Chen
    et al., arXiv 2107.03374, eq. 1). Counts are integers and divided once, so there is no rounding before that.

    Raises:
        ValueError: `k` is not in 1..n.
    """
    n = _checked(len(rewards), k)
    at_most = below = 0
    terms = []
    for value, count in sorted(Counter(rewards).items()):
        at_most += count
        terms.append(value * ((comb(at_most, k) - comb(below, k)) / comb(n, k)))
        below = at_most
    return fsum(terms)


def majority_at(answers: Sequence[Hashable | None], rewards: Sequence[float], k: int) -> float:
    """Mean over all subsets of `k` responses of the reward of the most frequent answer.

    Tied answers share the subset evenly. A response without an answer (None) has no vote; a subset of only such
    responses has reward 0. The reward of an answer is the mean reward of all responses that give it.

    Subsets are not enumerated. For each number of votes that may win, a dynamic program over the answers computes the
    probability of the number of responses drawn and of winners, and the expected sum of the winners' rewards.

    Raises:
        ValueError: `k` is not in 1..n.
    """
    n = _checked(len(answers), k)
    by_answer: dict[Hashable, list[float]] = defaultdict(list)
    for answer, reward in zip(answers, rewards, strict=True):
        if answer is not None:
            by_answer[answer].append(reward)
    votes = [len(found) for found in by_answer.values()]
    answer_rewards = [fsum(found) / len(found) for found in by_answer.values()]
    chances = _chances([n - sum(votes), *votes], k)
    return fsum(
        _won_by(most, votes, answer_rewards, chances, k) for most in range(1, min(k, max(votes, default=0)) + 1)
    )


def bootstrap(values_PM: Array, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Estimate]:
    """Mean of each column over problems, with its percentile bootstrap interval.

    Problems are drawn with replacement, the same ones for every column. The draws depend on `seed` only: NumPy
    guarantees the stream of RandomState on all machines and versions.
    """
    problems = len(values_PM)
    generator = np.random.RandomState(seed % 2**32)  # RandomState takes 32 bits
    means_RM = np.stack([values_PM[generator.randint(problems, size=problems)].mean(0) for _ in range(resamples)])
    low_M, high_M = np.quantile(means_RM, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    value_M = [fsum(column) / problems for column in values_PM.T]
    return [Estimate(*map(float, ends)) for ends in zip(value_M, low_M, high_M, strict=True)]


def _checked(n: int, k: int) -> int:
    if not 1 <= k <= n:
        raise ValueError(f"{k} of {n} responses")
    return n


def _chances(counts: Sequence[int], k: int) -> list[Array]:
    """Per answer, the probability of [number drawn of it, number drawn of earlier answers], given the latter."""
    left, chances = sum(counts), []
    for count in counts:
        left -= count
        chance = np.zeros((min(count, k) + 1, k + 1))
        for before in range(k + 1):
            rest = k - before
            if rest <= left + count:
                for drawn in range(min(count, rest) + 1):
                    chance[drawn, before] = comb(count, drawn) * comb(left, rest - drawn) / comb(left + count, rest)
        chances.append(chance)
    return chances


def _won_by(most: int, votes: Sequence[int], rewards: Sequence[float], chances: Sequence[Array], k: int) -> float:
    """Contribution to `majority_at` of subsets in which the winning answers have `most` votes each.

    The state is the probability of [responses drawn, winners], and its product with the expected sum of the winners'
    rewards.
    """
    ties = k // most
    state_2KV = np.zeros((2, k + 1, ties + 2))
    state_2KV[0, : len(chances[0]), 0] = chances[0][:, 0]
    for count, reward, chance in zip(votes, rewards, chances[1:], strict=True):
        following_2KV = np.zeros_like(state_2KV)
        for drawn in range(min(count, most, k) + 1):
            part_2KV = state_2KV[:, : k + 1 - drawn] * chance[drawn, : k + 1 - drawn, None]
            if drawn == most:
                part_2KV[1] += reward * part_2KV[0]
                part_2KV = np.roll(part_2KV, 1, axis=2)
            following_2KV[:, drawn:] += part_2KV
        state_2KV = following_2KV
    return fsum(state_2KV[1, k, winners] / winners for winners in range(1, ties + 1))
