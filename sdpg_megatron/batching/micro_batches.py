"""Assign samples to data-parallel ranks and micro-batches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.config import RunConfig


@dataclass(frozen=True, slots=True)
class Limit:
    """Size limit of a micro-batch."""

    sequences: int
    tokens: int | None = None
    """Student and teacher tokens with padding, over all context-parallel ranks; replaces `sequences` if set. A larger
    sample gets a micro-batch alone."""

    @classmethod
    def of(cls, config: RunConfig) -> Limit:
        return cls(config.optimizer.micro_batch_size, config.optimizer.micro_batch_tokens)


def plan(samples: Sequence[Sample], ranks: int, limit: Limit, *, alike: bool) -> list[list[list[Sample]]]:
    """Assign a step's samples: for each data-parallel rank its micro-batches, the same number on every rank.

    Args:
        alike: group samples of similar length, which saves padding; only without a limit on tokens. Otherwise
            micro-batches cost about the same.
    """
    if limit.tokens is None:
        shares = balance(samples, ranks, room=-(-len(samples) // ranks))
        count = -(-max(1, *map(len, shares)) // limit.sequences)
        return [
            _alike(share, count) if alike else balance(share, count, room=-(-len(share) // count) or 1)
            for share in shares
        ]
    shares = balance(samples, ranks)
    count = max(1, *(-(-sum(sample.cost for sample in share) // limit.tokens) for share in shares))
    while True:
        parts = [balance(share, count) for share in shares]
        if all(_fits(part, limit.tokens) for rank in parts for part in rank):
            return parts
        count += 1


def balance(samples: Sequence[Sample], parts: int, *, room: int | None = None) -> list[list[Sample]]:
    """Distribute samples over `parts`: the costliest first, each to the part of least cost that has room left.

    Args:
        room: maximum number of samples in a part; None for no limit.
    """
    dealt: list[list[Sample]] = [[] for _ in range(parts)]
    costs = [(0, part) for part in range(parts)]
    for sample in sorted(samples, key=lambda sample: -sample.cost):
        cost, part = heapq.heappop(costs)
        dealt[part].append(sample)
        if room is None or len(dealt[part]) < room:
            heapq.heappush(costs, (cost + sample.cost, part))
    return dealt


def _alike(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    # Not by cost: the teacher's tokens would put a response next to others of twice its length.
    ordered = sorted(samples, key=lambda sample: len(sample.student_prompt) + len(sample.response))
    return [ordered[len(ordered) * i // parts : len(ordered) * (i + 1) // parts] for i in range(parts)]


def _fits(samples: Sequence[Sample], tokens: int) -> bool:
    return len(samples) < 2 or sum(sample.cost for sample in samples) <= tokens
