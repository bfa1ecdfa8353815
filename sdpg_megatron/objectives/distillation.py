"""The distillation term: what draws the student's distribution to that of the privileged teacher. T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import RequiredPasses, StepContext, TokenLoss, TokenMetric, TokenTerms
from sdpg_megatron.objectives.policy import clipped_ratio
from sdpg_megatron.objectives.ratios import LOG_RATIO_BOUND, regularizer_weight
from sdpg_megatron.objectives.reference import reference_loss
from sdpg_megatron.objectives.schedules import BetaSchedule


class Distillation:
    """beta(k) m D(p, SG q) + alpha * L_K: no outcome term, so that rewards are reported and nothing else."""

    name = "distillation"

    def __init__(self, config: ObjectiveConfig, schedule: BetaSchedule) -> None:
        self.config = config
        self.schedule = schedule

    def required_passes(self, context: StepContext) -> RequiredPasses:
        distils, sampled = self.schedule.at(context.step) > 0, self.config.distill_loss == "clipped_ratio"
        return RequiredPasses(
            teacher=distils and not sampled,
            teacher_logprob=distils and sampled,
            reference=self.config.alpha > 0,
            policy_loss=False,
        )

    def distill_enabled(self, advantage: float) -> bool:
        return advantage > 0 or not self.config.gate

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        # The schedule runs backward through every micro-batch, also where nothing is distilled.
        term = distilled if self.config.distill_loss == "divergence" else sampled_token_distilled
        loss = TokenLoss(0 * terms.logprob_T) + term(terms, self.config, self.schedule.at(context.step), context)
        return loss + reference_loss(terms, self.config) if self.config.alpha else loss


def distilled(terms: TokenTerms, config: ObjectiveConfig, beta: float, context: StepContext) -> TokenLoss:
    """The term at the weight `beta`, which may be 0.

    Raises:
        ValueError: a divergence is lacking where it counts.
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


def sampled_token_distilled(terms: TokenTerms, config: ObjectiveConfig, beta: float, context: StepContext) -> TokenLoss:
    """PPO's clipped ratio with the token advantage max(log q - log p_old, 0), at the weight `beta`.

    The form of OPSD in the public SDPG code (github lauyikfung/SDPG): a token that the teacher finds less likely than
    the student is left alone.

    Raises:
        ValueError: the teacher's log-probs are lacking where they count.
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
    """A divergence of at most `bound` in size. Beyond, its gradient is scaled by bound / divergence, not cut to 0."""
    size_T = divergence_T.detach().abs()
    return divergence_T * (bound / size_T.clamp(min=bound))


def _present(divergence_T: Tensor | None, terms: TokenTerms, message: str) -> Tensor:
    """A divergence, which a micro-batch without an open gate may lack."""
    if divergence_T is not None:
        return divergence_T
    if terms.any_open_gate:
        raise ValueError(message)
    return torch.zeros_like(terms.gate_T)
