"""The distillation loss: divergence of the student from the privileged teacher, and its schedule. T response tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import StepContext, TokenLoss, TokenMetric, TokenTerms
from sdpg_megatron.objectives.policy import LOG_RATIO_BOUND, clipped_ratio, regularizer_weight

PAPER_WARMUP_SHARE = 50 / 400


@dataclass(frozen=True, slots=True)
class BetaSchedule:
    """beta(k) = peak * min(1, k / warmup) * min(1, (T - k) / decay), k = 1 .. T; a ramp of 0 steps is left out.

    arXiv 2606.04036, section 3.5.2 and algorithm 1. k counts optimizer steps: at the last mini-batch of a rollout it
    equals the paper's k times the number of mini-batches.
    """

    peak: float
    warmup_steps: int
    decay_steps: int
    total_steps: int

    @classmethod
    def build(cls, peak: float, warmup_steps: int | None, decay_steps: int | None, total_steps: int) -> BetaSchedule:
        """Build a schedule. A ramp of None takes the paper's share: 50 steps of 400 up, all other steps down."""
        if warmup_steps is None:
            warmup_steps = min(round(PAPER_WARMUP_SHARE * total_steps), total_steps - (decay_steps or 0))
        if decay_steps is None:
            decay_steps = total_steps - max(warmup_steps, round(PAPER_WARMUP_SHARE * total_steps))
        return cls(peak, warmup_steps, decay_steps, total_steps)

    def at(self, step: int) -> float:
        """beta(k) after `step` optimizer steps, k = `step` + 1; with a decay it is 0 from k = T on."""
        k = step + 1
        rise = min(1.0, k / self.warmup_steps) if self.warmup_steps else 1.0
        fall = min(1.0, max(0.0, (self.total_steps - k) / self.decay_steps)) if self.decay_steps else 1.0
        return self.peak * rise * fall


def distillation_loss(terms: TokenTerms, config: ObjectiveConfig, beta: float, context: StepContext) -> TokenLoss:
    """beta m D(p, SG q); `beta` may be 0.

    Raises:
        ValueError: beta > 0, a gate is open and the terms have no divergence.
    """
    metrics = {
        "distill/beta": TokenMetric(torch.full_like(terms.gate_T, beta)),
        "distill/gate_rate": TokenMetric(terms.gate_T),
    }
    if not beta:
        return TokenLoss(torch.zeros_like(terms.gate_T), metrics)
    divergence_T = _present(terms.divergence_T, terms, "beta > 0 and an open gate need the divergence to the teacher")
    gated_T = terms.gate_T > 0
    metrics["distill/kl"] = TokenMetric(divergence_T.detach(), mask_T=gated_T)
    if config.divergence_clip is not None:
        clipped_T = divergence_T.detach().abs() > config.divergence_clip
        metrics["distill/clip_fraction"] = TokenMetric(clipped_T.float(), mask_T=gated_T)
        divergence_T = clip(divergence_T, config.divergence_clip)
    weight_T = beta * context.distill_scale * regularizer_weight(terms, config) * terms.gate_T
    return TokenLoss(weight_T * divergence_T, metrics)


def sampled_token_distillation(
    terms: TokenTerms, config: ObjectiveConfig, beta: float, context: StepContext
) -> TokenLoss:
    """PPO's clipped ratio with the token advantage max(log q - log p_old, 0), at the weight `beta`.

    OPSD's form in the public SDPG code (github lauyikfung/SDPG): a token with q < p_old gives no gradient.

    Raises:
        ValueError: beta > 0, a gate is open and the terms have no teacher log-probs.
    """
    metrics = {
        "distill/beta": TokenMetric(torch.full_like(terms.gate_T, beta)),
        "distill/gate_rate": TokenMetric(terms.gate_T),
    }
    if not beta:
        return TokenLoss(torch.zeros_like(terms.gate_T), metrics)
    message = "beta > 0 and an open gate need the teacher's log-probs"
    advantage_T = _present(terms.teacher_logprob_T, terms, message) - terms.old_logprob_T
    advantage_T = terms.gate_T * advantage_T.clamp(0, LOG_RATIO_BOUND)
    surrogate = clipped_ratio(
        terms.logprob_T,
        terms.old_logprob_T,
        advantage_T,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=None,
    )
    gated_T, ratio_clipped = terms.gate_T > 0, surrogate.metrics["policy/clip_high_fraction"]
    metrics["distill/token_advantage"] = TokenMetric(advantage_T, mask_T=gated_T)
    metrics["distill/clip_fraction"] = TokenMetric(ratio_clipped.values_T, mask_T=gated_T)
    return TokenLoss(beta * context.distill_scale * surrogate.loss_T, metrics)


def clip(divergence_T: Tensor, bound: float) -> Tensor:
    """Bound a divergence. Above `bound` its gradient is scaled by bound / divergence, not set to 0."""
    size_T = divergence_T.detach().abs()
    return divergence_T * (bound / size_T.clamp(min=bound))


def _present(divergence_T: Tensor | None, terms: TokenTerms, message: str) -> Tensor:
    """The tensor, or zeros for a micro-batch without an open gate."""
    if divergence_T is not None:
        return divergence_T
    if terms.any_open_gate:
        raise ValueError(message)
    return torch.zeros_like(terms.gate_T)
