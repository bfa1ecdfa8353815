"""Which data-parallel rank computes a sample, and in which micro-batch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.config import RunConfig


@dataclass(frozen=True, slots=True)
class Limit:
    """What a micro-batch may hold."""

    sequences: int
    tokens: int | None = None
    """All that is processed for its samples, on all context-parallel ranks, the teacher's tokens included; in the place
    of `sequences`. A sample with more has a micro-batch of its own."""

    @classmethod
    def of(cls, config: RunConfig) -> Limit:
        return cls(config.optimizer.micro_batch_size, config.optimizer.micro_batch_tokens)


def plan(samples: Sequence[Sample], ranks: int, limit: Limit, *, alike: bool) -> list[list[list[Sample]]]:
    """Share a step out: for each data-parallel rank its micro-batches, all with the same number of them.

    Args:
        limit: of each micro-batch.
        alike: put samples of like length into one micro-batch, which costs less where they are padded; without a bound
            on tokens. Otherwise micro-batches cost about the same.
    """
    if limit.tokens is None:
        shares = balance(samples, ranks, room=-(-len(samples) // ranks))
        count = -(-max(1, *map(len, shares)) // limit.sequences)
        return [_alike(share, count) if alike else _even(share, count) for share in shares]
    shares = balance(samples, ranks)
    count = max(1, *(-(-sum(sample.cost for sample in share) // limit.tokens) for share in shares))
    while True:
        parts = [balance(share, count) for share in shares]
        if all(_fits(part, limit.tokens) for rank in parts for part in rank):
            return parts
        count += 1


def balance(samples: Sequence[Sample], parts: int, *, room: int | None = None) -> list[list[Sample]]:
    """Deal samples to `parts`: the costliest first, each to the part of least cost that has room left.

    Args:
        room: samples of a part at most; None for any number.
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
    # Not by cost: a response that the teacher reads, too, would meet others of twice its length.
    ordered = sorted(samples, key=lambda sample: len(sample.student_prompt) + len(sample.response))
    return [ordered[len(ordered) * i // parts : len(ordered) * (i + 1) // parts] for i in range(parts)]


def _even(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    return balance(samples, parts, room=-(-len(samples) // parts) or 1)


def _fits(samples: Sequence[Sample], tokens: int) -> bool:
    return len(samples) < 2 or sum(sample.cost for sample in samples) <= tokens
