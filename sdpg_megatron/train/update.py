"""From a step's groups to new weights: the teacher's context, mini-batches, the passes before, the updates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from sdpg_megatron.batching.collate import PackingLayout
from sdpg_megatron.batching.micro_batches import Limit
from sdpg_megatron.batching.peer_context import with_peers
from sdpg_megatron.batching.samples import distill_nothing, make_samples
from sdpg_megatron.batching.step_batch import StepBatch, build_step, with_corrections
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.render import Renderer
from sdpg_megatron.errors import MismatchError, SkippedStepsError
from sdpg_megatron.mcore.forward_step import NONFINITE
from sdpg_megatron.mcore.parallel import split_evenly
from sdpg_megatron.mcore.policy_trainer import SKIPPED, PolicyTrainer
from sdpg_megatron.objectives.base import StepContext
from sdpg_megatron.objectives.mismatch import DIFFERENCE
from sdpg_megatron.observe.metrics import Metric, merge
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.train.inputs import Inputs

logger = logging.getLogger(__name__)


class PolicyUpdater:
    """What the learner is given, and does with it. Every rank calls every method."""

    def __init__(self, config: RunConfig, inputs: Inputs, policy_trainer: PolicyTrainer, skipped: int = 0) -> None:
        """`skipped`: what it was where the run goes on."""
        self._config, self._inputs, self._learner = config, inputs, policy_trainer
        self.skipped = skipped
        """Optimizer steps that were skipped in a row, up to now."""
        self._gated = config.rollout.mismatch_limit is None
        """Whether the rollout engine's log-probs were held against the learner's."""
        self._fresh = True
        """Whether the step's responses are from the learner's own weights."""

    def with_context(self, groups: list[ScoredGroup]) -> list[ScoredGroup]:
        """Give the teacher what it is to read, where that is not in the data."""
        objective = self._config.objective
        if objective.context == "data":
            return groups
        renderer = Renderer(self._config.data, self._inputs.tokenizer)
        return with_peers(
            groups,
            renderer,
            objective.peer_reward,
            self._config.max_teacher_tokens,
            strip_thinking=objective.strip_peer_thinking,
        )

    def prepare(self, step: int, groups: Sequence[ScoredGroup]) -> list[StepBatch]:
        """The mini-batches of the step after `step`, with what has to be computed before the weights change."""
        self._learner.begin(step)
        self._fresh = all(c.weight_version == step for scored in groups for c in scored.group.completions)
        parts = [split_evenly(groups, number, self._minibatches) for number in range(self._minibatches)]
        return [self._prepare(part, self._context(step, number)) for number, part in enumerate(parts)]

    def learn(self, step: int, batches: Sequence[StepBatch]) -> dict[str, Metric]:
        """One optimizer step on each mini-batch.

        Raises:
            MismatchError: on every rank, after the first step, before its weights are published or saved.
            SkippedStepsError: on every rank, where too many were skipped in a row.
        """
        updates = merge([self._update(batch, self._context(step, number)) for number, batch in enumerate(batches)])
        self._check_mismatch(step, updates)
        return updates

    @property
    def _minibatches(self) -> int:
        return self._config.optimizer.minibatches

    def _context(self, step: int, minibatch: int) -> StepContext:
        return StepContext(step * self._minibatches + minibatch, self._config.total_optimizer_steps)

    def _prepare(self, groups: Sequence[ScoredGroup], context: StepContext) -> StepBatch:
        config, policy_trainer, ranks = self._config, self._learner, self._learner.ranks
        required_passes = policy_trainer.objective.required_passes(context)
        distill_enabled = policy_trainer.objective.distill_enabled if required_passes.privileged else distill_nothing
        batch = build_step(
            make_samples(
                groups,
                config.objective,
                distill_enabled=distill_enabled,
                outcome=required_passes.policy_loss,
                stop_ids=self._inputs.stop_ids,
            ),
            regularized=required_passes.reference or required_passes.every_token,
            limit=Limit.of(config),
            layout=PackingLayout.of(config, ranks),
            device=policy_trainer.device,
        )
        corrected = config.objective.correction != "none"
        if self._minibatches > 1 or corrected:
            batch = batch.with_micro_batches(policy_trainer.with_old_logprobs(batch.micro_batches))
        if corrected:
            sharers = ranks.context_group if ranks.context_size > 1 else None
            batch = batch.with_micro_batches(with_corrections(batch.micro_batches, config.objective, sharers))
        if required_passes.reference:
            batch = batch.with_micro_batches(policy_trainer.with_reference(batch.micro_batches))
        if required_passes.teacher:
            batch = batch.with_micro_batches(policy_trainer.with_early_teacher(batch.micro_batches))
        if required_passes.teacher_logprob:
            batch = batch.with_micro_batches(policy_trainer.with_teacher_logprobs(batch.micro_batches))
        return batch

    def _update(self, batch: StepBatch, context: StepContext) -> dict[str, Metric]:
        gated = self._config.objective.distill_average == "gated"
        scale = batch.distill_scale if gated else 1.0
        metrics = self._learner.update(batch.micro_batches, StepContext(context.step, context.total_steps, scale))
        self._count(context.step, metrics)
        return metrics

    def _count(self, step: int, metrics: Mapping[str, Metric]) -> None:
        self.skipped = self.skipped + 1 if metrics[SKIPPED].value else 0
        if not self.skipped:
            return
        if self._learner.ranks.is_main:
            tokens = f"{metrics[NONFINITE].value:.0f} response tokens whose terms are not"
            found = "found a gradient that is not finite" + (f", and {tokens}" if metrics[NONFINITE].value else "")
            limit = self._config.optimizer.skip_limit
            logger.warning("optimizer step %d: skipped, number %d of %d in a row: %s", step, self.skipped, limit, found)
        if self.skipped >= self._config.optimizer.skip_limit:
            raise SkippedStepsError(step, self.skipped)

    def _check_mismatch(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Hold the first step's rollout against its training, once: both have computed the same tokens' log-probs."""
        limit = self._config.rollout.mismatch_limit
        if self._gated or limit is None or not self._fresh:
            return
        if DIFFERENCE not in metrics or not metrics[DIFFERENCE].weight:
            return
        self._gated = True
        if not metrics[DIFFERENCE].value <= limit:
            raise MismatchError(step, metrics[DIFFERENCE].value, limit)
