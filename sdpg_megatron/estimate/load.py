"""Token counts of a run's steps and micro-batches: largest and mean."""

from __future__ import annotations

from dataclasses import dataclass

from sdpg_megatron import objectives
from sdpg_megatron.config import RunConfig
from sdpg_megatron.objectives.base import RequiredPasses

MEAN_LENGTH = 0.5
"""Assumed mean length of prompts and responses, as a share of their limits."""
MEAN_GATED = 0.5
"""Assumed share of responses that the teacher reads if the gate is on."""


@dataclass(frozen=True, slots=True)
class Load:
    """Token counts. Those of a micro-batch are upper bounds, over all its context-parallel ranks."""

    required_passes: RequiredPasses
    student: int
    """Student tokens of a micro-batch, with prompts."""
    teacher: int
    """Teacher tokens of a micro-batch; 0 without a teacher."""
    response: int
    teacher_rows: int
    """Response tokens with a teacher row of an optimizer step, per data-parallel rank."""
    micro_batches: int
    """Micro-batches of an optimizer step, per data-parallel rank, at full lengths."""
    samples: int
    """Samples of a rollout step."""
    mean_prompt: float
    mean_response: float
    gated: float
    """Mean share of responses that the teacher reads."""
    old_logprobs: bool
    """True if a forward-only pass computes the log-probs of the sampling weights."""

    @classmethod
    def of(cls, config: RunConfig, data: int) -> Load:
        """`data`: number of data-parallel ranks."""
        steps = config.total_optimizer_steps
        required_passes = objectives.passes_of_run(objectives.build_objective(config.objective, steps), steps)
        rollout, optimizer = config.rollout, config.optimizer
        samples = rollout.prompts_per_step * rollout.group_size
        share = -(-samples // (optimizer.minibatches * data))
        longest = config.data.max_prompt_tokens + rollout.max_response_tokens
        reading = (config.max_teacher_tokens + rollout.max_response_tokens) if required_passes.privileged else 0
        limit = optimizer.micro_batch_tokens
        if limit is None:
            together = min(optimizer.micro_batch_size, share)
            student, teacher = together * longest, together * reading
            response, count = together * rollout.max_response_tokens, -(-share // together)
        else:
            # One sample alone, or several within the limit; samples without a teacher read may fill it alone.
            student = max(longest, min(limit, share * longest))
            teacher = max(reading, min(limit * reading // (longest + reading), share * reading))
            response = min(student, share * rollout.max_response_tokens)
            together = max(1, limit // (longest + reading))
            count = -(-share // together)
        # In a group with unequal rewards, at least one response has no positive advantage.
        most = share - share // rollout.group_size if config.objective.gate else share
        return cls(
            required_passes=required_passes,
            student=student,
            teacher=teacher,
            response=response,
            teacher_rows=most * rollout.max_response_tokens if required_passes.privileged else 0,
            micro_batches=count,
            samples=samples,
            mean_prompt=MEAN_LENGTH * config.data.max_prompt_tokens,
            mean_response=MEAN_LENGTH * rollout.max_response_tokens,
            old_logprobs=optimizer.minibatches > 1 or config.objective.correction != "none",
            gated=0.0 if not required_passes.privileged else MEAN_GATED if config.objective.gate else 1.0,
        )

    @property
    def mean_student(self) -> float:
        """Student tokens of a rollout step."""
        return self.samples * (self.mean_prompt + self.mean_response)

    @property
    def mean_teacher(self) -> float:
        return self.gated * self.mean_student

    @property
    def mean_forward_only(self) -> float:
        """Tokens of a rollout step's forward-only passes: old and reference log-probs, teacher."""
        return self.mean_student * (self.old_logprobs + self.required_passes.reference) + self.mean_teacher

    @property
    def mean_responses(self) -> float:
        return self.samples * self.mean_response
