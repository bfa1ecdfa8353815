"""Collect the groups that a step trains on: generate in rounds, score, shape rewards, select."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from sdpg_megatron.checkpoint.prefetched_rollouts import PrefetchedRollouts
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.objectives import Objective
from sdpg_megatron.observe.metrics import Metric
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.rewards.failures import check_failures
from sdpg_megatron.rewards.shaping import Shaping
from sdpg_megatron.rollout.base import Sampling
from sdpg_megatron.train.rollouts import Rollouts, describe, with_shaping
from sdpg_megatron.train.seeds import draw_seed
from sdpg_megatron.train.selection import GroupFilterChain, Selection, select

logger = logging.getLogger(__name__)


class Collector:
    """Collects the groups of each step. Every rank calls every method and gets the same groups."""

    def __init__(
        self, config: RunConfig, prompts: PromptSource, rollouts: Rollouts, objective: Objective, ranks: ParallelState
    ) -> None:
        self._config, self._prompts, self._rollouts, self._ranks = config, prompts, rollouts, ranks
        self._shaping = Shaping.build(config.reward, config.rollout.max_response_tokens)
        self._advantages = objective.advantages
        self._filter_chain = GroupFilterChain(config.selection, ranks)
        self._pending: Sequence[int] = ()

    def begin(self, step: int, cursor: Cursor) -> None:
        """Start generating the first round of the step after `step` in the background, with the published weights."""
        wanted = self._config.rollout.prompts_per_step
        self._pending = cursor.take(math.ceil(wanted * self._config.selection.oversample))
        self._rollouts.begin([self._prompts[i] for i in self._pending], self._sampling(step, 0))

    def cancel(self) -> None:
        """Abandon the pending round, if any."""
        self._rollouts.cancel()

    def finish(self) -> PrefetchedRollouts:
        """Wait for the pending round."""
        return PrefetchedRollouts(tuple(self._pending), tuple(self._rollouts.finish()))

    def collect(self, step: int, cursor: Cursor, prefetched: PrefetchedRollouts | None = None) -> Selection:
        """Collect the groups of the step after `step`; `cursor` advances by the prompts taken.

        Args:
            prefetched: first round, generated already, or only its prompts.

        Raises:
            Abandoned: the run was asked to stop.
            VerifierError: more verifier calls failed than `reward.failure_limit` allows; on every rank.
        """
        generated: list[ScoredGroup] = []

        def generate(count: int, number: int) -> list[ScoredGroup]:
            if number == 0 and prefetched is not None and prefetched.groups:
                groups = list(prefetched.groups)
            else:
                indices = prefetched.indices if number == 0 and prefetched is not None else cursor.take(count)
                groups = self._rollouts.run([self._prompts[i] for i in indices], self._sampling(step, number))
            generated.extend(groups)
            check_failures(f"step {step + 1}", generated, self._config.reward.failure_limit)
            return with_shaping(groups, self._shaping, self._advantages)

        wanted = self._config.rollout.prompts_per_step
        selection = select(generate, wanted, self._filter_chain, self._config.selection)
        if len(selection.kept) < wanted and self._ranks.is_main:
            reasons = ", ".join(f"{count} {reason}" for reason, count in selection.dropped.items() if count)
            logger.warning(
                "step %d: %d of %d groups kept after %d prompts in %d rounds, dropped: %s",
                *(step, len(selection.kept), wanted, len(selection.generated), selection.rounds, reasons),
            )
        return selection

    def describe(self, step: int, selection: Selection) -> dict[str, Metric]:
        """Metrics of the generated and the kept groups, for the step after `step`."""
        chosen = selection.metrics() if self._filter_chain.active else {}
        staleness = describe_staleness(step, selection.generated) if self._config.rollout.ahead else {}
        return {**describe(selection.generated, self._shaping), **chosen, **staleness}

    def _sampling(self, step: int, number: int) -> Sampling:
        """Sampling parameters of a round of the step."""
        rollout = self._config.rollout
        purpose = f"rollout/{step}/{number}" if number else f"rollout/{step}"
        return Sampling(
            n=rollout.group_size,
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            experts=rollout.replay_routing,
            seed=draw_seed(self._config.seed, purpose, self._ranks.replica),
        )


def describe_staleness(step: int, groups: Sequence[ScoredGroup]) -> dict[str, Metric]:
    """Mean number of steps from the weights that responses were sampled from to the weights after `step`."""
    steps = [step - completion.weight_version for scored in groups for completion in scored.group.completions]
    return {"rollout/staleness": Metric(sum(steps) / len(steps), weight=len(steps))}
