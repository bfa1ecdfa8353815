"""SDPG: outcome, gated distillation from the privileged teacher, and reference term (arXiv 2606.04036)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import Needs, StepContext, TokenLoss, TokenMetric, TokenTerms
from sdpg_megatron.objectives.grpo import GRPO
from sdpg_megatron.objectives.ratios import regularizer_weight
from sdpg_megatron.objectives.schedules import BetaSchedule


class SDPG:
    """L_out + beta(k) m KL(p || SG q) + alpha * L_K. Where beta(k) is 0 this is RPG."""

    name = "sdpg"

    def __init__(self, config: ObjectiveConfig, schedule: BetaSchedule) -> None:
        self.config = config
        self.schedule = schedule
        self.undistilled = GRPO(config)

    def needs(self, context: StepContext) -> Needs:
        return replace(self.undistilled.needs(context), teacher=self.schedule.at(context.step) > 0)

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        loss = self.undistilled.loss(terms, context)
        beta = self.schedule.at(context.step)
        metrics = {
            **loss.metrics,
            "distill/beta": TokenMetric(torch.full_like(terms.gate_T, beta)),
            "distill/gate_rate": TokenMetric(terms.gate_T),
        }
        if not beta:
            return TokenLoss(loss.loss_T, metrics)
        divergence_T = _divergence(terms)
        gated_T = terms.gate_T > 0
        metrics["distill/kl"] = TokenMetric(divergence_T.detach(), mask_T=gated_T)
        if self.config.divergence_clip is not None:
            clipped_T = divergence_T.detach().abs() > self.config.divergence_clip
            metrics["distill/clip_fraction"] = TokenMetric(clipped_T.float(), mask_T=gated_T)
            divergence_T = clip(divergence_T, self.config.divergence_clip)
        weight_T = beta * context.distill_scale * regularizer_weight(terms, self.config) * terms.gate_T
        return TokenLoss(loss.loss_T + weight_T * divergence_T, metrics)


def clip(divergence_T: Tensor, bound: float) -> Tensor:
    """A divergence of at most `bound` in size. Beyond, its gradient is scaled by bound / divergence, not cut to 0."""
    size_T = divergence_T.detach().abs()
    return divergence_T * (bound / size_T.clamp(min=bound))


def _divergence(terms: TokenTerms) -> Tensor:
    """The divergence, which a micro-batch without an open gate may lack.

    Raises:
        ValueError: it is lacking where a gate is open.
    """
    if terms.divergence_T is not None:
        return terms.divergence_T
    if bool(terms.gate_T.any()):
        raise ValueError("beta > 0 and an open gate need the divergence to the teacher")
    return torch.zeros_like(terms.gate_T)
