"""Advantages of the responses to one prompt, and aggregation weights of a step's sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from statistics import fmean, pstdev, stdev
from typing import Literal

from sdpg_megatron.config import Deviation

EPSILON = 1e-6
Aggregation = Literal["token-mean", "group-token-mean", "sequence-mean"]


def group_advantages(rewards_G: Iterable[float], deviation: Deviation = "population") -> tuple[float, ...]:
    """``(R_i - mean) / (std + 1e-6)`` over the G responses to one prompt (arXiv 2402.03300, section 4.1.2).

    All exactly 0 if the rewards are equal: a rounding error of the mean must not open a gate.

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


def sequence_weights(
    lengths_N: Sequence[int], groups_N: Sequence[Hashable], aggregation: Aggregation
) -> tuple[float, ...]:
    """Weight of each token's loss, by sequence, such that ``sum(weight * loss) / tokens`` is the step's loss.

    Computed over all N sequences of an optimizer step, on all ranks, so that no split changes them. Summed over tokens
    they give the number of tokens. A sequence without response tokens has weight 0.

    Args:
        lengths_N: response tokens of each sequence.
        groups_N: prompt id of each sequence.
        aggregation: "token-mean": equal weights. "sequence-mean": mean over sequences of their token means.
            "group-token-mean": mean over prompts of the token mean over the prompt's responses (arXiv 2606.04036).
    """
    tokens_of = Counter[Hashable]()
    for group, length in zip(groups_N, lengths_N, strict=True):
        tokens_of[group] += length
    tokens = sum(lengths_N)
    match aggregation:
        case "token-mean":
            return (1.0,) * len(lengths_N)
        case "sequence-mean":
            parts = sum(length > 0 for length in lengths_N)
            return tuple(tokens / (parts * length) if length else 0.0 for length in lengths_N)
        case "group-token-mean":
            parts = sum(length > 0 for length in tokens_of.values())
            return tuple(tokens / (parts * tokens_of[group]) if tokens_of[group] else 0.0 for group in groups_N)
