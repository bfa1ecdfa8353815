"""Evaluate a run's current model on the held-out prompts."""

from __future__ import annotations

from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.evaluation.problems import by_file
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.observe.metrics import values
from sdpg_megatron.rollout.base import Abandoned
from sdpg_megatron.train.evaluate import evaluate, metrics
from sdpg_megatron.train.journal import Journal
from sdpg_megatron.train.rollouts import Rollouts


class HeldOut:
    """Held-out prompts, if any. Every rank calls every method and gets the same results."""

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptDataset | None,
        rollouts: Rollouts,
        journal: Journal,
        ranks: ParallelState,
    ) -> None:
        self._config, self._rollouts, self._journal, self._ranks = config, rollouts, journal, ranks
        self._files = by_file(prompts.prompts) if prompts is not None else {}

    def __bool__(self) -> bool:
        return bool(self._files)

    def measure(self, step: int) -> dict[str, float] | None:
        """Generate, score and record responses after `step`; return their metrics.

        None, with nothing recorded, if the run was asked to stop before all responses were generated.
        """
        if not self:
            return {}
        config = self._config
        try:
            problems = {
                name: evaluate(config, self._rollouts, prompts, self._ranks.replica, name)
                for name, prompts in self._files.items()
            }
        except Abandoned:
            return None
        self._journal.write_evaluation(step, self._files, problems)
        return values(metrics(config, problems))


def evaluations_after(step: int, config: RunConfig) -> int:
    """Number of evaluations still due after `step`."""
    steps, every = config.steps, config.eval.every
    if step >= steps:
        return 0
    return steps // every - step // every + (steps % every > 0) if every else 1
