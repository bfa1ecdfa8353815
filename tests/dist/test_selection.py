"""The same groups on every rank, and on any number of data-parallel replicas."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from sdpg_megatron.config import ParallelConfig, RewardConfig, SelectionConfig
from sdpg_megatron.errors import FilterError
from sdpg_megatron.records import Completion, Group, Prompt, ScoredGroup
from sdpg_megatron.rewards.pool import GroupRewards
from sdpg_megatron.rollout.base import Abandoned, Bucket, Sampling, Stop
from tests.completions import make_completion
from tests.pool import RankPool

HERE = "tests.dist.test_selection"


class Engine:
    """Responses follow from prompt and seed, so that they do not depend on who generates them."""

    weight_version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Stop) -> list[Group]:
        if stop():
            raise Abandoned

        def completion(prompt: Prompt, number: int) -> Completion:
            token = zlib.crc32(f"{prompt.uid}/{sampling.seed}/{number}".encode()) % 100
            return make_completion((token,), (-1.0,), "stop", 0, str(token))

        return [Group(prompt, tuple(completion(prompt, n) for n in range(sampling.n))) for prompt in prompts]

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None: ...

    def close(self) -> None: ...


class Verifiers:
    """Two thirds of the prompts are dead. (A real pool cannot start its processes in the tests' ranks.)"""

    def score(self, groups: Sequence[Group], *, extract: bool = False) -> list[GroupRewards]:
        return [GroupRewards(tuple(self._reward(g.prompt, c) for c in g.completions), 0) for g in groups]

    def _reward(self, prompt: Prompt, completion: Completion) -> float:
        kind = int(prompt.uid) % 3
        return float(kind == 1) if kind else int(completion.tokens[0]) / 100

    def close(self) -> None: ...


def not_6(group: ScoredGroup) -> bool:
    return group.group.prompt.uid != "6"


def by_lot(group: ScoredGroup) -> bool:
    """Another sequence on every rank and in every call."""
    return random.SystemRandom().random() < 0.5


def refuses(group: ScoredGroup) -> bool:
    raise ValueError("no idea")


def steps(filters: tuple[str, ...] = (), max_rounds: int = 20) -> Any:
    """What two steps keep, by rank; or the error that ended them."""
    from sdpg_megatron.data.cursor import Cursor
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.objectives.advantages import group_advantages
    from sdpg_megatron.rewards.shaping import Shaping
    from sdpg_megatron.train.rollouts import Rollouts, with_shaping
    from sdpg_megatron.train.selection import GroupFilterChain, select

    ranks = parallel.initialize(ParallelConfig(), 0)
    rollouts = Rollouts(ranks, Engine(), Verifiers())  # type: ignore[arg-type]
    config = SelectionConfig(drop_dead=True, filters=filters, max_rounds=max_rounds)
    filter_chain, cursor = GroupFilterChain(config, ranks), Cursor(12, seed=1, shuffle=True)
    shaping = Shaping.build(RewardConfig(clip=(0.0, 0.9)), 8)
    found = []
    for step in range(2):

        def ask(count: int, number: int, step: int = step) -> list[ScoredGroup]:
            prompts = [Prompt(str(i), (1,), (1,), "") for i in cursor.take(count)]
            return with_shaping(
                rollouts.run(prompts, Sampling(4, 8, seed=100 * step + number)), shaping, group_advantages
            )

        try:
            selection = select(ask, 5, filter_chain, config)
        except FilterError as error:
            return str(error)
        found.append((selection.kept, dict(selection.dropped), selection.rounds, cursor.state()))
    return found


def test_any_number_of_replicas_keeps_the_same_groups(ranks: RankPool) -> None:
    (alone,) = ranks.run(steps, 1, (f"{HERE}:not_6",))
    one, other = ranks.run(steps, 2, (f"{HERE}:not_6",))
    assert alone == one == other
    for kept, left_out, rounds, _ in alone:
        assert len(kept) == 5 and rounds > 1
        assert {int(scored.group.prompt.uid) % 3 for scored in kept} == {0}
        assert all(any(scored.advantages) for scored in kept)
        assert min(left_out[reason] for reason in ("right", "wrong", "not_6")) > 0


def test_a_filter_that_draws_lots_draws_once_for_all(ranks: RankPool) -> None:
    one, other = ranks.run(steps, 2, (f"{HERE}:by_lot",))
    assert one == other


def stopped(asked: int) -> str:
    """What a rank is told where the one of number `asked` is to stop."""
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.train.rollouts import Rollouts

    ranks = parallel.initialize(ParallelConfig(), 0)
    rollouts = Rollouts(ranks, Engine(), Verifiers(), stop=lambda: ranks.rank == asked)  # type: ignore[arg-type]
    try:
        rollouts.run([Prompt(str(i), (1,), (1,), "") for i in range(4)], Sampling(4, 8))
    except Abandoned as error:
        return str(error)
    return "nothing"


def test_where_one_leader_is_to_stop_all_ranks_do(ranks: RankPool) -> None:
    one, other = ranks.run(stopped, 2, 1)
    assert one == other == str(Abandoned())


def test_a_filter_that_raises_does_so_on_every_rank(ranks: RankPool) -> None:
    found = ranks.run(steps, 2, (f"{HERE}:refuses",))
    assert found[0] == found[1]
    assert "ValueError: no idea" in found[0]


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_runs_out_of_rounds(ranks: RankPool, world: int) -> None:
    found = ranks.run(steps, world, (), 2)
    assert all(result == found[0] for result in found)
    assert [(len(kept) < 5, rounds) for kept, _, rounds, _ in found[0]] == [(True, 2)] * 2
