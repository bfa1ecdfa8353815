"""How many tokens a run's steps and micro-batches have: at most, and on average."""

from __future__ import annotations

from dataclasses import dataclass

from sdpg_megatron import objectives
from sdpg_megatron.config import RunConfig
from sdpg_megatron.objectives.base import RequiredPasses

MEAN_LENGTH = 0.5
"""Assumed mean of prompts and responses, over their limits."""
MEAN_GATED = 0.5
"""Assumed share of responses that the teacher reads, where the gate is on."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens. Those of a micro-batch are what it can have at most, over its context-parallel ranks."""

    required_passes: RequiredPasses
    student: int
    """Of a micro-batch's student sequences, prompts too."""
    teacher: int
    """Of its teacher sequences; 0 without a teacher."""
    response: int
    taught: int
    """Response tokens with a teacher row of an optimizer step, on one data-parallel rank."""
    micro_batches: int
    """Of an optimizer step, on one data-parallel rank; at full length."""
    samples: int
    """Of a rollout step."""
    mean_prompt: float
    mean_response: float
    gated: float
    """Mean share of responses that the teacher reads."""

    @classmethod
    def of(cls, config: RunConfig, data: int) -> Load:
        """`data`: data-parallel ranks."""
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
            # One sample alone, or several that keep the limit; those that no teacher reads fill it by themselves.
            student = max(longest, min(limit, share * longest))
            teacher = max(reading, min(limit * reading // (longest + reading), share * reading))
            response = min(student, share * rollout.max_response_tokens)
            together = max(1, limit // (longest + reading))
            count = -(-share // together)
        # In a group whose rewards differ, one response at least has no positive advantage.
        most = share - share // rollout.group_size if config.objective.gate else share
        return cls(
            required_passes=required_passes,
            student=student,
            teacher=teacher,
            response=response,
            taught=(most * rollout.max_response_tokens if required_passes.privileged else 0),
            micro_batches=count,
            samples=samples,
            mean_prompt=MEAN_LENGTH * config.data.max_prompt_tokens,
            mean_response=MEAN_LENGTH * rollout.max_response_tokens,
            gated=0.0 if not required_passes.privileged else MEAN_GATED if config.objective.gate else 1.0,
        )

    @property
    def mean_student(self) -> float:
        """Tokens of a rollout step's student sequences."""
        return self.samples * (self.mean_prompt + self.mean_response)

    @property
    def mean_teacher(self) -> float:
        return self.gated * self.mean_student

    @property
    def mean_responses(self) -> float:
        return self.samples * self.mean_response
