"""Turn scored groups into training sequences, with gates and weights over the whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.advantages import sequence_weights
from sdpg_megatron.records import ScoredGroup

if TYPE_CHECKING:
    from sdpg_megatron.records import LogProbs, Routing, TokenIds

    Gates = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class Sample:
    """One response of N tokens as a training sequence."""

    student_prompt: TokenIds
    teacher_prompt: TokenIds
    """Empty if there is none; all gates are then closed."""
    response: TokenIds
    logprobs: LogProbs
    advantage: float
    gates: Gates
    """[N]: True at response tokens with a distillation term."""
    weight: float
    """Loss weight of each response token."""
    experts: Routing | None = field(default=None, repr=False)
    """Experts of all tokens of the student sequence but the last; None for the router's choice."""
    unit: int = 1
    """Sequence lengths are padded to a multiple of this; see `PackingLayout.unit`."""
    predicted: Gates | None = None
    """[N]: True at response tokens that the policy sampled; None for all. The others, such as the output of a tool, are
    only read: they have no gate and no row."""

    @cached_property  # planning reads it and the cost many times
    def gate(self) -> bool:
        """True if any gate is open: the teacher then reads the response."""
        return bool(self.gates.any())

    @cached_property
    def cost(self) -> int:
        """Tokens to process, padding to `unit` included: the student sequence, and the teacher's if a gate is open."""
        prompts = (self.student_prompt, self.teacher_prompt) if self.gate else (self.student_prompt,)
        return sum(-(-(len(prompt) + len(self.response)) // self.unit) * self.unit for prompt in prompts)


def distill_nothing(advantage: float) -> bool:
    """`distill_enabled` of `make_samples` for a step without a teacher."""
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
        distill_enabled: `Objective.distill_enabled`, or `distill_nothing`.
        outcome: True if the loss reads advantages; otherwise they are set to 0.
        stop_ids: tokens without a distillation term unless `ObjectiveConfig.distill_stop_tokens`.
    """
    arrays: dict[int, TokenIds] = {}

    def array(prompt: tuple[int, ...]) -> TokenIds:
        """Convert a prompt once, as the responses of a group share it."""
        if id(prompt) not in arrays:
            arrays[id(prompt)] = np.array(prompt, np.int32)
        return arrays[id(prompt)]

    undistilled = [] if config.distill_stop_tokens else list(stop_ids)
    lengths = [len(c.tokens) for scored in groups for c in scored.group.completions]
    group_ids = [number for number, scored in enumerate(groups) for _ in scored.group.completions]
    weights = iter(sequence_weights(lengths, group_ids, config.aggregation))
    samples = []
    for scored in groups:
        for number, (completion, advantage) in enumerate(zip(scored.group.completions, scored.advantages, strict=True)):
            teacher_prompt = scored.teacher_prompt(number)
            distilled = teacher_prompt is not None and distill_enabled(advantage)
            gates = ~np.isin(completion.tokens, undistilled) if distilled else np.zeros(len(completion.tokens), bool)
            samples.append(
                Sample(
                    student_prompt=array(scored.group.prompt.student_tokens),
                    teacher_prompt=array(teacher_prompt or ()),
                    response=completion.tokens,
                    logprobs=completion.logprobs,
                    advantage=advantage if outcome else 0.0,
                    gates=gates,
                    weight=next(weights),
                    experts=completion.experts,
                )
            )
    return samples


def with_gradient(samples: Sequence[Sample]) -> list[Sample]:
    """Keep the samples with a gradient from the policy or the distillation term.

    Weights are multiplied by the kept share of the tokens, since the loss is divided by the number of kept tokens.
    """
    kept = [sample for sample in samples if sample.gate or sample.advantage]
    share = sum(len(s.response) for s in kept) / max(1, sum(len(s.response) for s in samples))
    return [replace(sample, weight=sample.weight * share) for sample in kept]
