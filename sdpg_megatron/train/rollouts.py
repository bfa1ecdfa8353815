"""Prompts in, scored groups out, over all replicas: each replica's leader generates and scores its own share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from sdpg_megatron.mcore.parallel import Ranks, split_evenly
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.observe.metrics import Metric, Reduction, merge
from sdpg_megatron.records import Completion, Group, Prompt, ScoredGroup
from sdpg_megatron.rewards.pool import GroupRewards, VerifierPool
from sdpg_megatron.rollout.base import Bucket, RolloutEngine, Sampling


class Rollouts:
    """The rollout side of a run. Every rank calls every method; only replica leaders have an engine and a verifier."""

    def __init__(self, ranks: Ranks, engine: RolloutEngine | None, verifiers: VerifierPool | None) -> None:
        assert (engine is not None) == (verifiers is not None) == ranks.leads_replica
        self._ranks = ranks
        self._engine = engine
        self._verifiers = verifiers

    def publish(self, version: int, stream: Iterable[Bucket]) -> None:
        """Hand the weight stream to the replica's engine; the other ranks drive their part of the gathering."""
        if self._engine is not None:
            self._engine.publish(version, stream)
        else:
            for _ in stream:
                pass

    def run(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[ScoredGroup]:
        """Generate and score one group per prompt; the same list, in the order of the prompts, on every rank."""
        share: list[tuple[tuple[Completion, ...], GroupRewards]] = []
        if self._engine is not None and self._verifiers is not None:
            mine = split_evenly(prompts, self._ranks.data, self._ranks.data_size)
            groups = self._engine.generate(mine, sampling) if mine else []
            share = [(g.completions, s) for g, s in zip(groups, self._verifiers.score(groups), strict=True)]
        # Every rank has the prompts, and replicas are in the order of their leaders' ranks.
        gathered = chain.from_iterable(self._ranks.gather_all(share))
        return [
            ScoredGroup(Group(prompt, completions), score.rewards, group_advantages(score.rewards), score.failures)
            for prompt, (completions, score) in zip(prompts, gathered, strict=True)
        ]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._verifiers is not None:
            self._verifiers.close()


def describe(groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Rewards, lengths and endings of a step's responses."""
    return merge(_describe(scored) for scored in groups)


def _describe(scored: ScoredGroup) -> dict[str, Metric]:
    completions = scored.group.completions
    n = len(completions)
    lengths = [len(completion.tokens) for completion in completions]
    return {
        "reward/mean": Metric(sum(scored.rewards) / n, weight=n),
        "reward/max_in_group": Metric(max(scored.rewards)),
        "reward/dead_groups": Metric(float(len(set(scored.rewards)) == 1)),
        "reward/failures": Metric(float(scored.failures), Reduction.SUM),
        "rollout/length": Metric(sum(lengths) / n, weight=n),
        "rollout/length_max": Metric(float(max(lengths)), Reduction.MAX),
        "rollout/truncated": Metric(sum(c.finish_reason == "length" for c in completions) / n, weight=n),
    }


def mean_reward(groups: Sequence[ScoredGroup]) -> float:
    """Mean over all responses."""
    rewards = [reward for scored in groups for reward in scored.rewards]
    return sum(rewards) / len(rewards)
