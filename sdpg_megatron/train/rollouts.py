"""Prompts in, scored groups out, over all replicas: each replica's leader generates and scores its own share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from sdpg_megatron.mcore.parallel import Ranks, split_evenly
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.observe.metrics import Metric, Reduction, merge
from sdpg_megatron.records import Completion, Group, Prompt, ScoredGroup
from sdpg_megatron.rewards.pool import GroupRewards, VerifierPool
from sdpg_megatron.rewards.shaping import Shaping
from sdpg_megatron.rollout.base import (
    Abandoned,
    Bucket,
    RolloutEngine,
    Sampling,
    SharedEngine,
    Stop,
    WeightsWanted,
    never,
)

Weights = Callable[[], Iterable[Bucket]]
"""A new stream of a replica's weights; every rank of the replica iterates it to its end."""


class Rollouts:
    """The rollout side of a run. Every rank calls every method; only replica leaders have an engine and a verifier."""

    def __init__(
        self,
        ranks: Ranks,
        engine: RolloutEngine | None,
        verifiers: VerifierPool | None,
        *,
        shared: bool = False,
        stop: Stop = never,
    ) -> None:
        """
        Args:
            shared: the engines are `SharedEngine`s, all on the same servers; the first replica's publishes.
            stop: whether this rank wants a generation to end.
        """
        assert (engine is not None) == (verifiers is not None) == ranks.leads_replica
        self._ranks = ranks
        self._engine = engine
        self._verifiers = verifiers
        self._shared, self._stop = shared, stop
        self._published: tuple[int, Weights] | None = None

    def publish(self, version: int, weights: Weights) -> None:
        """Bring the weights to the engines.

        Where each replica has an engine of its own, each streams its weights. Servers that are shared need them once:
        the first replica's.
        """
        self._published = version, weights
        if self._streams:
            if self._engine is not None:
                self._engine.publish(version, weights())
            else:
                _drive(weights())
        if self._shared:
            self._ranks.barrier()  # nobody asks the servers for what they do not have yet
            if isinstance(self._engine, SharedEngine) and not self._streams:
                self._engine.follow(version)

    def verify(self, version: int, weights: Weights) -> None:
        """Compare what shared servers have with what the trainer has; see `SharedEngine`."""
        if self._shared and self._streams:
            if isinstance(self._engine, SharedEngine):
                self._engine.verify(version, weights())
            else:
                _drive(weights())

    def release(self) -> None:
        """Have the servers give their memory to the trainer."""
        if self._streams and isinstance(self._engine, SharedEngine):
            self._engine.release()
        self._ranks.barrier()

    def resume(self) -> None:
        """The servers may take their memory again; the next thing that they need are weights."""
        self._ranks.barrier()  # all ranks have made room
        if self._streams and isinstance(self._engine, SharedEngine):
            self._engine.resume()

    @property
    def _streams(self) -> bool:
        """Whether this rank's replica hands out weights."""
        return not self._shared or self._ranks.replica == 0

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, *, extract: bool = False) -> list[ScoredGroup]:
        """Generate and score one group per prompt; the same list, in the order of the prompts, on every rank.

        `extract`: also have the answers read, where the verifier can.

        Raises:
            Abandoned: a leader was to stop while it generated; on every rank.
        """
        share: list[tuple[tuple[Completion, ...], GroupRewards]] = []
        groups = self._generate(split_evenly(prompts, self._ranks.replica, self._ranks.replicas), sampling)
        if self._verifiers is not None:
            share = [
                (g.completions, s) for g, s in zip(groups, self._verifiers.score(groups, extract=extract), strict=True)
            ]
        # Every rank has the prompts, and replicas are in the order of their leaders' ranks.
        gathered = chain.from_iterable(self._ranks.gather_all(share))
        return [
            ScoredGroup(
                Group(prompt, completions),
                score.rewards,
                group_advantages(score.rewards),
                score.failures,
                score.answers,
            )
            for prompt, (completions, score) in zip(prompts, gathered, strict=True)
        ]

    def _generate(self, mine: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """This replica's groups, on its leader. Servers that came back without weights get them in between."""
        groups: dict[int, Group] = {}
        missing = list(range(len(mine))) if self._engine is not None else []
        abandoned: Abandoned | None = None
        while True:
            if self._engine is not None and missing:
                found: Mapping[int, Group] = {}
                try:
                    found = dict(enumerate(self._engine.generate([mine[i] for i in missing], sampling, self._stop)))
                except WeightsWanted as wanted:
                    found = wanted.done
                except Abandoned as error:
                    abandoned = error
                groups.update({missing[place]: group for place, group in found.items()})
                missing = [i for i in missing if i not in groups]
            states = self._ranks.gather_all((abandoned, bool(missing)))
            if first := next((error for error, _ in states if error is not None), None):
                raise first
            if not any(wanting for _, wanting in states):
                return [groups[i] for i in sorted(groups)]
            assert self._published is not None, "engines ask for weights that they had"
            self.publish(*self._published)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._verifiers is not None:
            self._verifiers.close()


def _drive(weights: Iterable[Bucket]) -> None:
    """Take this rank's part in gathering weights that another rank uses."""
    for _ in weights:
        pass


def with_shaping(groups: Sequence[ScoredGroup], shaping: Shaping) -> list[ScoredGroup]:
    """The same groups with the advantages of their shaped rewards. `rewards` stay the verifier's."""
    return [
        replace(scored, advantages=group_advantages(shaping.shape(scored.rewards, scored.group.completions)))
        for scored in groups
    ]


def describe(groups: Sequence[ScoredGroup], shaping: Shaping) -> dict[str, Metric]:
    """Rewards, lengths and endings of a step's responses."""
    shaped = (shaping.describe(scored.rewards, scored.group.completions) for scored in groups)
    return merge(chain(map(_describe, groups), shaped))


def _describe(scored: ScoredGroup) -> dict[str, Metric]:
    completions = scored.group.completions
    n = len(completions)
    lengths = [len(completion.tokens) for completion in completions]
    stops = [math.exp(c.logprobs[-1]) for c in completions if c.finish_reason == "stop"]
    return {
        "reward/mean": Metric(sum(scored.rewards) / n, weight=n),
        "reward/max_in_group": Metric(max(scored.rewards)),
        "reward/dead_groups": Metric(float(len(set(scored.rewards)) == 1)),
        "reward/failures": Metric(float(scored.failures), Reduction.SUM),
        "rollout/length": Metric(sum(lengths) / n, weight=n),
        "rollout/length_max": Metric(float(max(lengths)), Reduction.MAX),
        "rollout/truncated": Metric(sum(c.finish_reason == "length" for c in completions) / n, weight=n),
        "rollout/stop_probability": Metric(sum(stops) / max(len(stops), 1), weight=len(stops)),
    }
