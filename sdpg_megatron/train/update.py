"""Update the weights from a step's groups: teacher context, mini-batches, passes before the update, updates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

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
from sdpg_megatron.mcore.policy import Policy
from sdpg_megatron.mcore.policy_trainer import SKIPPED, PolicyTrainer
from sdpg_megatron.objectives.base import StepContext
from sdpg_megatron.objectives.mismatch import DIFFERENCE
from sdpg_megatron.observe.metrics import Metric, merge
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.train.inputs import Inputs

logger = logging.getLogger(__name__)


class StepPreparer:
    """Builds a step's mini-batches. Every rank calls every method."""

    def __init__(self, config: RunConfig, inputs: Inputs, policy: Policy) -> None:
        self._config, self._inputs, self._policy = config, inputs, policy
        self._mismatch_checked = config.rollout.mismatch_limit is None
        self._on_policy = True
        """True if the step's responses are from the trainer's current weights."""

    def with_context(self, groups: list[ScoredGroup]) -> list[ScoredGroup]:
        """Add the teacher's context, unless it is in the data."""
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
        """Build the mini-batches of the step after `step`, with all tensors that need the weights before the update."""
        self._policy.begin(step)
        self._on_policy = all(c.weight_version == step for scored in groups for c in scored.group.completions)
        parts = [split_evenly(groups, number, self._minibatches) for number in range(self._minibatches)]
        return [self._prepare(part, self.context(step, number)) for number, part in enumerate(parts)]

    @property
    def _minibatches(self) -> int:
        return self._config.optimizer.minibatches

    def context(self, step: int, minibatch: int, batch: StepBatch | None = None) -> StepContext:
        """Context of a mini-batch of the step after `step`. `batch`: its data, which the training pass needs."""
        context = StepContext(step * self._minibatches + minibatch, self._config.total_optimizer_steps)
        if batch is not None and self._config.objective.distill_average == "gated":
            context = replace(context, distill_scale=batch.distill_scale)
        return context

    def _prepare(self, groups: Sequence[ScoredGroup], context: StepContext) -> StepBatch:
        config, policy, ranks = self._config, self._policy, self._policy.ranks
        required_passes = policy.objective.required_passes(context)
        distill_enabled = policy.objective.distill_enabled if required_passes.privileged else distill_nothing
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
            device=policy.device,
        )
        corrected = config.objective.correction != "none"
        if self._minibatches > 1 or corrected:
            batch = batch.with_micro_batches(policy.with_old_logprobs(batch.micro_batches))
        if corrected:
            sharers = ranks.context_group if ranks.context_size > 1 else None
            batch = batch.with_micro_batches(with_corrections(batch.micro_batches, config.objective, sharers))
        if required_passes.reference:
            batch = batch.with_micro_batches(policy.with_reference(batch.micro_batches))
        if required_passes.teacher:
            batch = batch.with_micro_batches(policy.with_early_teacher(batch.micro_batches))
        if required_passes.teacher_logprob:
            batch = batch.with_micro_batches(policy.with_teacher_logprobs(batch.micro_batches))
        return batch

    def check_mismatch(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Compare the rollout's and the trainer's log-probs of the same tokens, once, on the first on-policy step.

        Raises:
            MismatchError: they differ by more than `rollout.mismatch_limit`.
        """
        limit = self._config.rollout.mismatch_limit
        if self._mismatch_checked or limit is None or not self._on_policy:
            return
        if DIFFERENCE not in metrics or not metrics[DIFFERENCE].weight:
            return
        self._mismatch_checked = True
        if not metrics[DIFFERENCE].value <= limit:
            raise MismatchError(step, metrics[DIFFERENCE].value, limit)


class PolicyUpdater(StepPreparer):
    """Builds a step's mini-batches and updates the weights. Every rank calls every method."""

    def __init__(self, config: RunConfig, inputs: Inputs, policy_trainer: PolicyTrainer, skipped: int = 0) -> None:
        super().__init__(config, inputs, policy_trainer)
        self._policy_trainer = policy_trainer
        self.skipped = skipped
        """Consecutive optimizer steps skipped up to now."""

    def update(self, step: int, batches: Sequence[StepBatch]) -> dict[str, Metric]:
        """Run one optimizer step on each mini-batch.

        Raises:
            MismatchError: on every rank, after the first step, before its weights are published or saved.
            SkippedStepsError: on every rank, if too many consecutive steps were skipped.
        """
        updates = merge(self._update(batch, self.context(step, n, batch)) for n, batch in enumerate(batches))
        self.check_mismatch(step, updates)
        return updates

    def _update(self, batch: StepBatch, context: StepContext) -> dict[str, Metric]:
        metrics = self._policy_trainer.update(batch.micro_batches, context)
        self._count(context.step, metrics)
        return metrics

    def _count(self, step: int, metrics: Mapping[str, Metric]) -> None:
        self.skipped = self.skipped + 1 if metrics[SKIPPED].value else 0
        if not self.skipped:
            return
        if self._policy_trainer.ranks.is_main:
            tokens = f"{metrics[NONFINITE].value:.0f} response tokens with terms that are not"
            found = "found a gradient that is not finite" + (f", and {tokens}" if metrics[NONFINITE].value else "")
            limit = self._config.optimizer.skip_limit
            logger.warning("optimizer step %d: skipped, number %d of %d in a row: %s", step, self.skipped, limit, found)
        if self.skipped >= self._config.optimizer.skip_limit:
            raise SkippedStepsError(step, self.skipped)
