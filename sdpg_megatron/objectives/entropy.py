"""The entropy bonus, which any objective can have."""

from __future__ import annotations

from dataclasses import replace

from sdpg_megatron.objectives.base import Objective, RequiredPasses, StepContext, TokenLoss, TokenTerms


class EntropyBonus:
    """Another objective's loss less coefficient * H, with H the policy's entropy over the whole vocabulary."""

    def __init__(self, objective: Objective, coefficient: float) -> None:
        self.name = objective.name
        self.objective = objective
        self.coefficient = coefficient

    def required_passes(self, context: StepContext) -> RequiredPasses:
        return replace(self.objective.required_passes(context), every_token=True)

    def distill_enabled(self, advantage: float) -> bool:
        return self.objective.distill_enabled(advantage)

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        """Raises `ValueError` where the terms have no entropy."""
        if terms.entropy_T is None:
            raise ValueError("an entropy bonus needs the entropy of the policy")
        loss = self.objective.loss(terms, context)
        return replace(loss, loss_T=loss.loss_T - self.coefficient * terms.entropy_T)
