"""Advantages of the responses to one prompt."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, pstdev, stdev

from sdpg_megatron.config import Deviation

EPSILON = 1e-6


def group_advantages(rewards_G: Iterable[float], deviation: Deviation = "population") -> tuple[float, ...]:
    """``(R_i - mean) / (std + 1e-6)`` over the G responses to one prompt (arXiv 2402.03300, section 4.1.2).

    All exactly 0 where the rewards are equal: a rounding error left in the mean must not open a gate.

    Args:
        deviation: std with the divisor G ("population") or G - 1 ("sample"); "none" for R_i - mean (2503.20783).
    """
    rewards = [float(reward) for reward in rewards_G]
    if len(set(rewards)) <= 1:
        return (0.0,) * len(rewards)
    mean = fmean(rewards)
    match deviation:
        case "population":
            scale = pstdev(rewards) + EPSILON
        case "sample":
            scale = stdev(rewards) + EPSILON
        case "none":
            scale = 1.0
    return tuple((reward - mean) / scale for reward in rewards)
