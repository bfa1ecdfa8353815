"""Advantages of the responses to one prompt."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, pstdev

EPSILON = 1e-6


def group_advantages(rewards_G: Iterable[float]) -> tuple[float, ...]:
    """``(R_i - mean) / (std + 1e-6)`` over the G responses to one prompt, with the population's deviation.

    All exactly 0 where the rewards are equal: a rounding error left in the mean must not open a gate.
    """
    rewards = [float(reward) for reward in rewards_G]
    if len(set(rewards)) <= 1:
        return (0.0,) * len(rewards)
    mean, scale = fmean(rewards), pstdev(rewards) + EPSILON
    return tuple((reward - mean) / scale for reward in rewards)
