"""How the losses of a whole step's response tokens become one number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

Aggregation = Literal["token-mean", "group-token-mean", "sequence-mean"]


def sequence_weights(
    lengths_N: Sequence[int], groups_N: Sequence[Hashable], aggregation: Aggregation
) -> tuple[float, ...]:
    """Weight of each token's loss, by sequence, such that ``sum(weight * loss) / tokens`` is the step's loss.

    Taken over all N sequences of an optimiser step, on all ranks, the weights do not depend on any split; summed over
    tokens they give the number of tokens. What has no response token has no mean and is left out, with weight 0.

    Args:
        lengths_N: response tokens of each sequence.
        groups_N: which prompt each sequence answers.
        aggregation: "token-mean": every token alike. "sequence-mean": mean over sequences of their token means.
            "group-token-mean": mean over prompts of the token mean over all responses to one (arXiv 2606.04036).
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
