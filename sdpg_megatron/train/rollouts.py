"""Generate and score groups over all replicas: each replica's leader processes its share of the prompts."""

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
"""Returns a new stream of a replica's weights, which every rank of the replica iterates to its end."""

Advantages = Callable[[Sequence[float]], Sequence[float]]
"""Advantage estimator: shaped rewards of one group to its advantages; see `Objective.advantages`."""

_Scored = tuple[tuple[Completion, ...], GroupRewards]


@dataclass(frozen=True, slots=True)
class _Request:
    """Arguments of one generation."""

    prompts: Sequence[Prompt]
    share: Sequence[Prompt]
    """Prompts of this rank."""
    sampling: Sampling
    extract: bool


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Progress of this rank's share of a request."""

    done: Mapping[int, _Scored]
    """Scored groups by the prompt's index in the share."""
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
            shared: True if the engines are `SharedEngine`s on the same servers; the first replica's publishes.
            stop: returns True once this rank wants a generation to end.
        """
        assert (engine is not None) == (verifiers is not None) == ranks.leads_replica
        self._ranks = ranks
        self._engine = engine
        self._verifiers = verifiers
        self._shared, self._stop = shared, stop
        self._published: tuple[int, Weights] | None = None
        self._pending: tuple[_Request, BackgroundCall[_Attempt]] | None = None

    def publish(self, version: int, weights: Weights) -> None:
        """Publish the weights to the engines.

        Each replica streams its weights to its engine; shared servers get the first replica's only.
        """
        self._published = version, weights
        if self._streams:
            if self._engine is not None:
                self._engine.publish(version, weights())
            else:
                _drain(weights())
        if self._shared:
            self._ranks.barrier()  # no rank requests this version before the servers have it
            if isinstance(self._engine, SharedEngine) and not self._streams:
                self._engine.follow(version)

    def verify(self, version: int, weights: Weights) -> None:
        """Compare the weights of shared servers with the trainer's; see `SharedEngine`."""
        if self._shared and self._streams:
            if isinstance(self._engine, SharedEngine):
                self._engine.verify(version, weights())
            else:
                _drain(weights())

    def release(self) -> None:
        """Free the servers' memory for the trainer."""
        if self._streams and isinstance(self._engine, SharedEngine):
            self._engine.release()
        self._ranks.barrier()

    def resume(self) -> None:
        """Let the servers allocate their memory again; they then need weights."""
        self._ranks.barrier()  # all ranks have freed theirs
        if self._streams and isinstance(self._engine, SharedEngine):
            self._engine.resume()

    @property
    def _streams(self) -> bool:
        """True if this rank's replica streams weights."""
        return not self._shared or self._ranks.replica == 0

    def trained(self, version: int) -> None:
        """Set the version of the weights that `publish` was given, after a training step has changed them.

        Servers that ask for weights during generation get these.
        """
        if self._published is not None:
            self._published = version, self._published[1]

    def check_verifier(self, prompt: Prompt) -> None:
        """Score a sample with each leader's verifier; see `VerifierPool.check`.

        Raises:
            ConfigError: on every rank, if a leader's verifier cannot be loaded or returns no valid reward.
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
        """Generate and score one group per prompt; every rank gets all groups, in the order of the prompts.

        Args:
            extract: also extract the answers, if the verifier can.

        Raises:
            Abandoned: a leader was asked to stop during generation; on every rank.
        """
        request = _Request(prompts, self._share(prompts), sampling, extract)
        return self._complete(request, self._attempt(request, {}, self._stop), self._stop)

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Generate and score in the background; `finish` returns the groups.

        Meanwhile ranks may do anything but `publish` and `run`.
        """
        assert self._pending is None, "one at a time"
        request = _Request(prompts, self._share(prompts), sampling, extract=False)
        self._pending = request, BackgroundCall(lambda stop: self._attempt(request, {}, stop))

    def finish(self) -> list[ScoredGroup]:
        """Wait for the generation that `begin` started; return as `run`."""
        assert self._pending is not None, "begin first"
        request, task = self._pending
        attempt = task.result()  # a signal may interrupt the wait; the task is then still there to cancel
        self._pending = None
        return self._complete(request, attempt, never)

    def cancel(self) -> None:
        """Cancel the pending generation, if any. Not a collective."""
        if self._pending is not None:
            (_, task), self._pending = self._pending, None
            task.cancel()

    def _share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Prompts of this rank's engine."""
        return split_evenly(prompts, self._ranks.replica, self._ranks.replicas) if self._engine is not None else ()

    def _attempt(self, request: _Request, done: Mapping[int, _Scored], stop: Stop) -> _Attempt:
        """Generate and score the missing groups of this rank's share. Not a collective."""
        missing = [index for index in range(len(request.share)) if index not in done]
        if self._engine is None or self._verifiers is None or not missing:
            return _Attempt(done)
        try:
            found = dict(enumerate(self._engine.generate([request.share[i] for i in missing], request.sampling, stop)))
        except WeightsWanted as wanted:
            found = wanted.done
        except Abandoned as error:
            return _Attempt(done, error)
        groups = [found[number] for number in sorted(found)]
        scores = self._verifiers.score(groups, extract=request.extract) if groups else []
        scored = [(group.completions, score) for group, score in zip(groups, scores, strict=True)]
        indices = [missing[number] for number in sorted(found)]
        return _Attempt({**done, **dict(zip(indices, scored, strict=True))})

    def _complete(self, request: _Request, attempt: _Attempt, stop: Stop) -> list[ScoredGroup]:
        """Gather all ranks' groups, with further attempts after publishing to servers that lost their weights."""
        while True:
            states = self._ranks.gather_all((attempt.abandoned, len(attempt.done) < len(request.share)))
            if first := next((error for error, _ in states if error is not None), None):
                raise first
            if not any(wanting for _, wanting in states):
                break
            assert self._published is not None, "engines only ask again for published weights"
            self.publish(*self._published)
            attempt = self._attempt(request, attempt.done, stop)
        # Every rank has the prompts, and replicas are in the order of their leaders' ranks.
        mine = [attempt.done[index] for index in sorted(attempt.done)]
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
            for prompt, (completions, score) in zip(request.prompts, gathered, strict=True)
        ]

    def close(self) -> None:
        self.cancel()
        if self._engine is not None:
            self._engine.close()
        if self._verifiers is not None:
            self._verifiers.close()


def _drain(weights: Iterable[Bucket]) -> None:
    """Take part in gathering weights that another rank uses."""
    for _ in weights:
        pass


def with_shaping(groups: Sequence[ScoredGroup], shaping: Shaping, estimate: Advantages) -> list[ScoredGroup]:
    """Add the advantages of the shaped rewards. `rewards` stay the verifier's."""
    shaped = [shaping.shape(scored.rewards, scored.group.completions) for scored in groups]
    return [
        replace(scored, advantages=tuple(estimate(rewards))) for scored, rewards in zip(groups, shaped, strict=True)
    ]


def describe(groups: Sequence[ScoredGroup], shaping: Shaping) -> dict[str, Metric]:
    """Metrics of a step's rewards, response lengths and finish reasons."""
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
