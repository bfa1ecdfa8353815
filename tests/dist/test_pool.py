"""The worker pool itself: results by rank, failures that neither hide nor hang."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankError, RankPool


def gather_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def misbehave(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise KeyError("lost")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    dist.barrier()


@pytest.fixture(scope="module")
def own_pool() -> Iterator[RankPool]:
    """Short waits, and no harm done to the workers of the other tests."""
    pool = RankPool(size=2, timeout=300.0, grace=0.5)
    yield pool
    pool.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(ranks: RankPool, world_size: int) -> None:
    total = sum(range(world_size)) + 10 * world_size
    assert ranks.run(gather_ranks, world_size, 10) == [(rank, total) for rank in range(world_size)]


@pytest.mark.parametrize(
    ("how", "message"), [("raise", r"rank 1 of 2: [\s\S]*KeyError: 'lost'"), ("die", "died with exit code 7")]
)
def test_a_failed_rank_ends_its_peers_and_the_pool_recovers(own_pool: RankPool, how: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        own_pool.run(misbehave, 2, how)
    assert own_pool.run(gather_ranks, 2, offset=0) == [(0, 1), (1, 1)]


def test_a_hung_rank_is_named(own_pool: RankPool) -> None:
    own_pool.run(gather_ranks, 2, 0)
    own_pool.timeout = 0.5
    with pytest.raises(RankError, match=r"rank 1 of 2: did not finish within [\s\S]* in misbehave"):
        own_pool.run(misbehave, 2, "hang")
