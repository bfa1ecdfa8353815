"""Prompts in, scored groups out, over all replicas: each replica's leader generates and scores its own share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from sdpg_megatron.errors import SdpgError
from sdpg_megatron.mcore.parallel import ParallelState, split_evenly
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
from sdpg_megatron.runtime.background import BackgroundCall

logger = logging.getLogger(__name__)

Weights = Callable[[], Iterable[Bucket]]
"""A new stream of a replica's weights; every rank of the replica iterates it to its end."""

Advantages = Callable[[Sequence[float]], Sequence[float]]
"""Advantage estimator: shaped rewards of one group to its advantages; see `Objective.advantages`."""

_Scored = tuple[tuple[Completion, ...], GroupRewards]


@dataclass(frozen=True, slots=True)
class _Call:
    """What was asked for."""

    prompts: Sequence[Prompt]
    share: Sequence[Prompt]
    """What this rank generates for."""
    sampling: Sampling
    extract: bool


@dataclass(frozen=True, slots=True)
class _Attempt:
    """How far this rank's share of a call is."""

    done: Mapping[int, _Scored]
    """By the prompt's place in the share."""
    abandoned: Abandoned | None = None


class Rollouts:
    """The rollout side of a run. Every rank calls every method; only replica leaders have an engine and a verifier."""

    def __init__(
        self,
        ranks: ParallelState,
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
        self._begun: tuple[_Call, BackgroundCall[_Attempt]] | None = None

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

    def trained(self, version: int) -> None:
        """The weights that `publish` was told of are those of `version` now: servers that ask for weights get these."""
        if self._published is not None:
            self._published = version, self._published[1]

    def check_verifier(self, prompt: Prompt) -> None:
        """Have each leader's verifier score a sample; see `VerifierPool.check`.

        Raises:
            ConfigError: on every rank, where a leader's verifier cannot be loaded or returns what is no reward.
        """
        error: SdpgError | None = None
        if self._verifiers is not None:
            try:
                check = self._verifiers.check(prompt)
                if (check.error is not None or check.unrewarded) and self._ranks.is_main:
                    logger.warning("%s", check)
            except SdpgError as found:
                error = found
        if first := next((found for found in self._ranks.gather_all(error) if found is not None), None):
            raise first

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, *, extract: bool = False) -> list[ScoredGroup]:
        """Generate and score one group per prompt; the same list, in the order of the prompts, on every rank.

        `extract`: also have the answers read, where the verifier can.

        Raises:
            Abandoned: a leader was to stop while it generated; on every rank.
        """
        call = _Call(prompts, self._share(prompts), sampling, extract)
        return self._complete(call, self._attempt(call, {}, self._stop), self._stop)

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Have the leaders generate and score from now on, whatever else their ranks do: all but `publish` and `run`.

        `finish` has the groups.
        """
        assert self._begun is None, "one at a time"
        call = _Call(prompts, self._share(prompts), sampling, extract=False)
        self._begun = call, BackgroundCall(lambda stop: self._attempt(call, {}, stop))

    def finish(self) -> list[ScoredGroup]:
        """What `run` would return, when what was begun is done."""
        assert self._begun is not None, "nothing was begun"
        call, task = self._begun
        attempt = task.result()  # a signal may end the waiting: then there is something to cancel
        self._begun = None
        return self._complete(call, attempt, never)

    def cancel(self) -> None:
        """End what was begun, if anything was. Every rank may call it on its own."""
        if self._begun is not None:
            (_, task), self._begun = self._begun, None
            task.cancel()

    def _share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """What this rank's engine is asked for."""
        return split_evenly(prompts, self._ranks.replica, self._ranks.replicas) if self._engine is not None else ()

    def _attempt(self, call: _Call, done: Mapping[int, _Scored], stop: Stop) -> _Attempt:
        """Generate and score what is missing of this rank's share. It takes part in no collective."""
        missing = [place for place in range(len(call.share)) if place not in done]
        if self._engine is None or self._verifiers is None or not missing:
            return _Attempt(done)
        try:
            found = dict(enumerate(self._engine.generate([call.share[i] for i in missing], call.sampling, stop)))
        except WeightsWanted as wanted:
            found = wanted.done
        except Abandoned as error:
            return _Attempt(done, error)
        groups = [found[number] for number in sorted(found)]
        scores = self._verifiers.score(groups, extract=call.extract) if groups else []
        scored = [(group.completions, score) for group, score in zip(groups, scores, strict=True)]
        places = [missing[number] for number in sorted(found)]
        return _Attempt({**done, **dict(zip(places, scored, strict=True))})

    def _complete(self, call: _Call, attempt: _Attempt, stop: Stop) -> list[ScoredGroup]:
        """All ranks' groups, from the first attempt on. Servers that came back without weights get them in between."""
        while True:
            states = self._ranks.gather_all((attempt.abandoned, len(attempt.done) < len(call.share)))
            if first := next((error for error, _ in states if error is not None), None):
                raise first
            if not any(wanting for _, wanting in states):
                break
            assert self._published is not None, "engines ask for weights that they had"
            self.publish(*self._published)
            attempt = self._attempt(call, attempt.done, stop)
        # Every rank has the prompts, and replicas are in the order of their leaders' ranks.
        mine = [attempt.done[place] for place in sorted(attempt.done)]
        gathered = chain.from_iterable(self._ranks.gather_all(mine))
        return [
            ScoredGroup(
                Group(prompt, completions),
                score.rewards,
                (),  # `with_shaping` computes them
                score.failures,
                score.answers,
                score.errors,
            )
            for prompt, (completions, score) in zip(call.prompts, gathered, strict=True)
        ]

    def close(self) -> None:
        self.cancel()
        if self._engine is not None:
            self._engine.close()
        if self._verifiers is not None:
            self._verifiers.close()


def _drive(weights: Iterable[Bucket]) -> None:
    """Take this rank's part in gathering weights that another rank uses."""
    for _ in weights:
        pass


def with_shaping(groups: Sequence[ScoredGroup], shaping: Shaping, estimate: Advantages) -> list[ScoredGroup]:
    """Add the advantages of the shaped rewards. `rewards` stay the verifier's."""
    shaped = [shaping.shape(scored.rewards, scored.group.completions) for scored in groups]
    return [
        replace(scored, advantages=tuple(estimate(rewards))) for scored, rewards in zip(groups, shaped, strict=True)
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
        "reward/failure_rate": Metric(scored.failures / n, weight=n),
        "rollout/length": Metric(sum(lengths) / n, weight=n),
        "rollout/length_max": Metric(float(max(lengths)), Reduction.MAX),
        "rollout/truncated": Metric(sum(c.finish_reason == "length" for c in completions) / n, weight=n),
        "rollout/stop_probability": Metric(sum(stops) / max(len(stops), 1), weight=len(stops)),
    }
