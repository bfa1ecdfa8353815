"""SDPG: outcome, gated distillation from the privileged teacher, and reference term (arXiv 2606.04036)."""

from __future__ import annotations

from dataclasses import replace

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import RequiredPasses, StepContext, TokenLoss, TokenTerms
from sdpg_megatron.objectives.distillation import distilled
from sdpg_megatron.objectives.rpg import RPG
from sdpg_megatron.objectives.schedules import BetaSchedule


class SDPG:
    """L_out + beta(k) m KL(p || SG q) + alpha * L_K. Where beta(k) is 0 this is RPG."""

    name = "sdpg"

    def __init__(self, config: ObjectiveConfig, schedule: BetaSchedule) -> None:
        self.config = config
        self.schedule = schedule
        self.undistilled = RPG(config)

    def required_passes(self, context: StepContext) -> RequiredPasses:
        return replace(self.undistilled.required_passes(context), teacher=self.schedule.at(context.step) > 0)

    def distill_enabled(self, advantage: float) -> bool:
        return advantage > 0 or not self.config.gate

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        beta = self.schedule.at(context.step)
        return self.undistilled.loss(terms, context) + distilled(terms, self.config, beta, context)
