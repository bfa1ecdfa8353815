"""Objectives: the passes they need, and per-token losses from per-token quantities.

Shapes: T response tokens of a micro-batch, Q responses, G responses to one prompt. Tensors are float32 unless said
otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.advantages import group_advantages
from sdpg_megatron.observe.metrics import Reduction


@dataclass(frozen=True, slots=True)
class RequiredPasses:
    """The passes an objective needs at one step. The trainer runs these and no others."""

    teacher: bool = False
    """Last hidden states of the teacher, for rows with an open gate."""
    teacher_logprob: bool = False
    """Log-probs of the sampled tokens under the teacher, for rows with an open gate. Computed once per rollout, before
    its first update."""
    reference: bool = False
    """Log-probs of the sampled tokens under the frozen reference weights."""
    every_token: bool = False
    """No pass: a term of the loss counts every token, independent of advantage, gate and reference."""
    policy_loss: bool = True
    """The loss reads advantages. If False, a response with closed gates gives no gradient."""

    @property
    def privileged(self) -> bool:
        """True if a pass reads the privileged context."""
        return self.teacher or self.teacher_logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """Inputs of an objective, per response token."""

    logprob_T: Tensor
    """log pi(y_t); carries the gradient."""
    divergence_T: Tensor | None
    """KL(student || teacher) in nats, 0 on rows with a closed gate; carries the gradient. None without a teacher."""
    old_logprob_T: Tensor
    """log pi_old(y_t), detached. With one optimizer step per rollout this is `logprob_T` detached."""
    reference_logprob_T: Tensor | None
    advantage_T: Tensor
    gate_T: Tensor
    """1 where the distillation term counts, else 0."""
    teacher_logprob_T: Tensor | None = None
    """log q(y_t), 0 on rows with a closed gate; no gradient. None without a teacher. Computed before the rollout's
    first update if `RequiredPasses.teacher_logprob` is set, else at this mini-batch."""
    entropy_T: Tensor | None = None
    """Entropy of the policy in nats; carries the gradient. None if the caller has not computed it."""
    any_open_gate: bool = True
    """True if the micro-batch has a token with an open gate. A host value: no objective waits for the device."""
    sequence_T: Tensor | None = None
    """int64: index of each token's response in the micro-batch. None if the caller has no sequence ids."""
    num_sequences: int = 0
    """Q."""
    context_group: ProcessGroup | None = None
    """Context-parallel ranks that hold the other tokens of these responses; None for this rank alone."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """Progress of the run."""

    step: int
    """Optimizer steps before this one. Schedules count from 1: their k is `step` + 1."""
    total_steps: int
    distill_scale: float = 1.0
    """All response tokens over gated response tokens of the whole step if the distillation term is averaged over gated
    tokens; otherwise 1."""


@dataclass(frozen=True, slots=True)
class TokenMetric:
    """A per-token quantity to report, and its reduction over tokens, micro-batches and ranks."""

    values_T: Tensor
    reduction: Reduction = Reduction.MEAN
    mask_T: Tensor | None = None
    """bool [T]: tokens that count; None for all."""


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per-token loss and its metrics."""

    loss_T: Tensor
    metrics: Mapping[str, TokenMetric] = field(default_factory=dict)

    def __add__(self, other: TokenLoss) -> TokenLoss:
        return TokenLoss(self.loss_T + other.loss_T, {**self.metrics, **other.metrics})


class Objective(ABC):
    """A training method. Subclass it for a method of your own: `objective.name: package.module:Class`."""

    defaults: ClassVar[Mapping[str, object]] = {}
    """Defaults of fields of the section `objective`, for a class outside this package. `options` declares parameters of
    the class itself: keys and default values of `objective.options`."""
    reads_sequences: bool = False
    """`loss` combines tokens of one response, as `sequence_mean` does. The head then calls it once per micro-batch with
    all tokens (schedule "recompute"); otherwise it may pass any subset of the tokens."""

    def __init__(self, config: ObjectiveConfig, total_steps: int) -> None:
        """
        Args:
            total_steps: optimizer steps of the run.
        """
        self.config = config
        self.total_steps = total_steps

    def advantages(self, rewards_G: Sequence[float]) -> tuple[float, ...]:
        """Advantages of the responses to one prompt, from their shaped rewards."""
        return group_advantages(rewards_G, self.config.advantage_deviation)

    def required_passes(self, context: StepContext) -> RequiredPasses:
        """The passes this step needs. By default the reference pass if `alpha` > 0.

        A pass that any step of a run needs must be needed at step 0, at step 1, at the middle or at the last step:
        these decide which weights a run keeps in memory.
        """
        return RequiredPasses(reference=self.config.alpha > 0)

    def distill_enabled(self, advantage: float) -> bool:
        """True if the teacher reads a response with this advantage, at a step that needs the teacher."""
        return False

    @abstractmethod
    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        """Per-token loss. The caller multiplies it by the micro-batch's aggregation weights."""


def sequence_mean(values_T: Tensor, terms: TokenTerms) -> Tensor:
    """Mean of values over each token's response, float [T], detached. A collective over `terms.context_group`.

    Raises:
        ValueError: the terms have no sequence ids.
    """
    if terms.sequence_T is None:
        raise ValueError("sequence_mean needs TokenTerms.sequence_T")
    return mean_by_sequence(values_T.detach(), terms.sequence_T, terms.num_sequences, terms.context_group)


def mean_by_sequence(values_T: Tensor, sequence_T: Tensor, sequences: int, group: ProcessGroup | None) -> Tensor:
    """Mean of values over each token's sequence, [T]. `group`: ranks that the sequences' tokens are sharded over."""
    counted_T2 = torch.stack((values_T, torch.ones_like(values_T)), dim=1)
    sums_Q2 = values_T.new_zeros(sequences, 2).index_add_(0, sequence_T, counted_T2)
    if group is not None:
        dist.all_reduce(sums_Q2, group=group)
    return (sums_Q2[:, 0] / sums_Q2[:, 1].clamp(min=1))[sequence_T]
