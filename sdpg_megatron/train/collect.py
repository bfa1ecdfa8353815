"""The groups that a step learns from: asked for round by round, scored, shaped, selected."""

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
    """Gets groups for steps. Every rank calls every method, and gets the same."""

    def __init__(
        self, config: RunConfig, prompts: PromptSource, rollouts: Rollouts, objective: Objective, ranks: ParallelState
    ) -> None:
        self._config, self._prompts, self._rollouts, self._ranks = config, prompts, rollouts, ranks
        self._shaping = Shaping.build(config.reward, config.rollout.max_response_tokens)
        self._advantages = objective.advantages
        self._filter_chain = GroupFilterChain(config.selection, ranks)
        self._begun: Sequence[int] = ()

    def begin(self, step: int, cursor: Cursor) -> None:
        """Have the first round of the step after `step` generated from now on, from the weights that are published."""
        wanted = self._config.rollout.prompts_per_step
        self._begun = cursor.take(math.ceil(wanted * self._config.selection.oversample))
        self._rollouts.begin([self._prompts[i] for i in self._begun], self._sampling(step, 0))

    def cancel(self) -> None:
        """Give up the round that was begun, if one was."""
        self._rollouts.cancel()

    def finish(self) -> PrefetchedRollouts:
        """The round that was begun, when it is done."""
        return PrefetchedRollouts(tuple(self._begun), tuple(self._rollouts.finish()))

    def collect(self, step: int, cursor: Cursor, prefetched: PrefetchedRollouts | None = None) -> Selection:
        """The groups of the step after `step`; `cursor` moves on by the prompts that this takes.

        Args:
            prefetched: its first round, if there is one already, or the prompts of it.

        Raises:
            Abandoned: the run is to stop.
            VerifierError: more verifier calls failed than `reward.failure_limit` allows; on every rank.
        """
        asked: list[ScoredGroup] = []

        def ask(count: int, number: int) -> list[ScoredGroup]:
            if number == 0 and prefetched is not None and prefetched.groups:
                groups = list(prefetched.groups)
            else:
                indices = prefetched.indices if number == 0 and prefetched is not None else cursor.take(count)
                groups = self._rollouts.run([self._prompts[i] for i in indices], self._sampling(step, number))
            asked.extend(groups)
            check_failures(f"step {step + 1}", asked, self._config.reward.failure_limit)
            return with_shaping(groups, self._shaping, self._advantages)

        wanted = self._config.rollout.prompts_per_step
        selection = select(ask, wanted, self._filter_chain, self._config.selection)
        if len(selection.kept) < wanted and self._ranks.is_main:
            reasons = ", ".join(f"{count} {reason}" for reason, count in selection.left_out.items() if count)
            logger.warning(
                "step %d: %d of %d groups kept after %d prompts in %d rounds, left out: %s",
                *(step, len(selection.kept), wanted, len(selection.asked), selection.rounds, reasons),
            )
        return selection

    def describe(self, step: int, selection: Selection) -> dict[str, Metric]:
        """Metrics of what was asked for and of what was kept, for the step after `step`."""
        chosen = selection.metrics() if self._filter_chain.active else {}
        late = describe_staleness(step, selection.asked) if self._config.rollout.ahead else {}
        return {**describe(selection.asked, self._shaping), **chosen, **late}

    def _sampling(self, step: int, number: int) -> Sampling:
        """How round `number` of the step samples."""
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
    """How many steps older than those after `step` the weights are that responses were sampled from."""
    late = [step - completion.weight_version for scored in groups for completion in scored.group.completions]
    return {"rollout/staleness": Metric(sum(late) / len(late), weight=len(late))}
