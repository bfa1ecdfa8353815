"""The groups that a step learns from: asked for round by round, scored, shaped, selected."""

from __future__ import annotations

import logging

from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.mcore.parallel import Ranks
from sdpg_megatron.observe.metrics import Metric
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.rewards.shaping import Shaping
from sdpg_megatron.rollout.base import Sampling
from sdpg_megatron.train.draws import draw_seed
from sdpg_megatron.train.rollouts import Rollouts, describe, with_shaping
from sdpg_megatron.train.selection import Judge, Selection, select

logger = logging.getLogger(__name__)


class Collector:
    """Gets groups for steps. Every rank calls every method, and gets the same."""

    def __init__(self, config: RunConfig, prompts: PromptSource, rollouts: Rollouts, ranks: Ranks) -> None:
        self._config, self._prompts, self._rollouts, self._ranks = config, prompts, rollouts, ranks
        self._shaping = Shaping.build(config.reward, config.rollout.max_response_tokens)
        self._judge = Judge(config.selection, ranks)

    def collect(self, step: int, cursor: Cursor) -> Selection:
        """The groups of the step after `step`; `cursor` moves on by the prompts that this takes.

        Raises:
            Abandoned: the run is to stop.
        """

        def ask(count: int, number: int) -> list[ScoredGroup]:
            prompts = [self._prompts[i] for i in cursor.take(count)]
            return with_shaping(self._rollouts.run(prompts, self._sampling(step, number)), self._shaping)

        wanted = self._config.rollout.prompts_per_step
        selection = select(ask, wanted, self._judge, self._config.selection)
        if len(selection.kept) < wanted and self._ranks.is_main:
            reasons = ", ".join(f"{count} {reason}" for reason, count in selection.left_out.items() if count)
            logger.warning(
                "step %d: %d of %d groups kept after %d prompts in %d rounds, left out: %s",
                *(step, len(selection.kept), wanted, len(selection.asked), selection.rounds, reasons),
            )
        return selection

    def describe(self, selection: Selection) -> dict[str, Metric]:
        """Metrics of what was asked for and of what was kept."""
        chosen = selection.metrics() if self._judge.active else {}
        return {**describe(selection.asked, self._shaping), **chosen}

    def _sampling(self, step: int, number: int) -> Sampling:
        """How round `number` of the step samples."""
        rollout = self._config.rollout
        purpose = f"rollout/{step}/{number}" if number else f"rollout/{step}"
        return Sampling(
            n=rollout.group_size,
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            experts=rollout.replay_routing,
            seed=draw_seed(self._config.seed, purpose, self._ranks.replica),
        )
