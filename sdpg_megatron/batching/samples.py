"""From scored groups to training sequences, with gates and weights over the whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.advantages import sequence_weights
from sdpg_megatron.records import ScoredGroup

if TYPE_CHECKING:
    from sdpg_megatron.records import Routing


@dataclass(frozen=True)
class Sample:
    """One response as a training sequence."""

    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    """Empty where there is none; then every gate is closed."""
    response: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float
    gates: tuple[bool, ...]
    """At which response tokens the teacher counts."""
    weight: float
    """Loss weight of each of its tokens."""
    experts: Routing | None = field(default=None, compare=False, repr=False)
    """Of every token of the student's prompt and the response but the last; None for the router's choice."""
    unit: int = 1
    """Of what the sequences' lengths are made multiples, see `Layout.unit`."""

    @cached_property  # plans ask for it and for the cost again and again
    def gate(self) -> bool:
        """It needs the teacher."""
        return any(self.gates)

    @cached_property
    def cost(self) -> int:
        """Tokens that the step has to process for it, in whole `unit`s: the teacher's count where the gate is open."""
        prompts = (self.student_prompt, *((self.teacher_prompt,) if self.gate else ()))
        return sum(-(-(len(prompt) + len(self.response)) // self.unit) * self.unit for prompt in prompts if prompt)


def nobody(advantage: float) -> bool:
    """`make_samples`' `taught` for a step without a teacher."""
    return False


def make_samples(
    groups: Sequence[ScoredGroup],
    config: ObjectiveConfig,
    *,
    distill_enabled: Callable[[float], bool],
    outcome: bool = True,
    stop_ids: Sequence[int] = (),
) -> list[Sample]:
    """Flatten groups, with gates and aggregation weights over the whole step.

    Args:
        taught: `Objective.taught`, or `nobody`.
        outcome: the loss reads advantages; otherwise the samples have none.
        stop_ids: tokens that the teacher may be kept from, see `ObjectiveConfig.distill_stop_tokens`.
    """
    undistilled = frozenset[int]() if config.distill_stop_tokens else frozenset(stop_ids)
    lengths = [len(c.tokens) for scored in groups for c in scored.group.completions]
    group_ids = [number for number, scored in enumerate(groups) for _ in scored.group.completions]
    weights = iter(sequence_weights(lengths, group_ids, config.aggregation))
    samples = []
    for scored in groups:
        for number, (completion, advantage) in enumerate(zip(scored.group.completions, scored.advantages, strict=True)):
            teacher_prompt = scored.teacher_prompt(number)
            read = teacher_prompt is not None and distill_enabled(advantage)
            samples.append(
                Sample(
                    student_prompt=scored.group.prompt.student_tokens,
                    teacher_prompt=teacher_prompt or (),
                    response=completion.tokens,
                    logprobs=completion.logprobs,
                    advantage=advantage if outcome else 0.0,
                    gates=tuple(read and token not in undistilled for token in completion.tokens),
                    weight=next(weights),
                    experts=completion.experts,
                )
            )
    return samples


def with_gradient(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that the outcome or the distillation term learns from.

    Their weights shrink by their share of the tokens: the sum is divided by the number of tokens that are left.
    """
    kept = [sample for sample in samples if sample.gate or sample.advantage]
    share = sum(len(s.response) for s in kept) / max(1, sum(len(s.response) for s in samples))
    return [replace(sample, weight=sample.weight * share) for sample in kept]
