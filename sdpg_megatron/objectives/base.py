"""What an objective is: which passes it needs, and per-token losses from per-token quantities.

Shapes: T response tokens of a micro-batch. All tensors are float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sdpg_megatron.observe.metrics import Reduction


@dataclass(frozen=True, slots=True)
class RequiredPasses:
    """The passes an objective needs at one step; the trainer runs these and no others."""

    teacher: bool = False
    """Last hidden states of the teacher, for the rows with an open gate."""
    teacher_logprob: bool = False
    """Log-probs of the sampled tokens under the teacher, for the rows with an open gate. They are computed once per
    rollout, before its first update."""
    reference: bool = False
    """Log-probs of the sampled tokens under the frozen reference weights."""
    every_token: bool = False
    """No pass: a term of the loss counts every token, whatever its advantage, gate and reference."""
    policy_loss: bool = True
    """Advantages. Without them a response that the teacher does not read teaches nothing."""

    @property
    def privileged(self) -> bool:
        """Some pass reads the privileged context."""
        return self.teacher or self.teacher_logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """What an objective may read, per response token."""

    logprob_T: Tensor
    """log pi(y_t); carries the gradient."""
    divergence_T: Tensor | None
    """KL(student || teacher) in nats, 0 on rows with a closed gate; carries the gradient. None without a teacher."""
    old_logprob_T: Tensor
    """log pi_old(y_t), detached. With one optimiser step per rollout this is `logprob_T` detached."""
    reference_logprob_T: Tensor | None
    advantage_T: Tensor
    gate_T: Tensor
    """float, 1 where the teacher counts."""
    teacher_logprob_T: Tensor | None = None
    """log q(y_t), 0 on rows with a closed gate; carries no gradient. None without a teacher. Computed before the
    rollout's first update where `RequiredPasses.teacher_logprob` asked for it, otherwise at this mini-batch."""
    entropy_T: Tensor | None = None
    """Of the policy, in nats; carries the gradient. None where the caller has no use for it."""
    any_open_gate: bool = True
    """The micro-batch has a token with an open gate. The host knows, so that no objective has to ask the device."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where the run stands."""

    step: int
    """Optimizer steps before this one. Schedules count from 1: their k is `step` + 1."""
    total_steps: int
    distill_scale: float = 1.0
    """All response tokens over gated response tokens of the whole step, where the distillation term is to be averaged
    over gated tokens only; otherwise 1."""


@dataclass(frozen=True, slots=True)
class TokenMetric:
    """A per-token quantity to report, and how it reduces over tokens, micro-batches and ranks."""

    values_T: Tensor
    reduction: Reduction = Reduction.MEAN
    mask_T: Tensor | None = None
    """bool [T]: which tokens count; all where None."""


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per-token loss, and what to report about it."""

    loss_T: Tensor
    metrics: Mapping[str, TokenMetric] = field(default_factory=dict)

    def __add__(self, other: TokenLoss) -> TokenLoss:
        return TokenLoss(self.loss_T + other.loss_T, {**self.metrics, **other.metrics})


class Objective(Protocol):
    """A training method: one file, one line of configuration."""

    name: str

    def required_passes(self, context: StepContext) -> RequiredPasses:
        """The passes this step needs: no teacher where beta is 0, no reference where alpha is 0.

        A pass that any step of a run needs is needed at step 0, at step 1, at the middle one or at the last one: those
        decide what a run keeps in memory.
        """
        ...

    def distill_enabled(self, advantage: float) -> bool:
        """Whether the teacher is to read a response with this advantage, at a step that needs the teacher."""
        ...

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        """Per-token loss. Aggregation over tokens is the caller's: it multiplies by the micro-batch's weights."""
        ...
