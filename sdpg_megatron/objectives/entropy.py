"""The entropy bonus, which any objective can have."""

from __future__ import annotations

from dataclasses import replace

from sdpg_megatron.objectives.base import Needs, Objective, StepContext, TokenLoss, TokenTerms


class EntropyBonus:
    """Another objective's loss less coefficient * H, with H the policy's entropy over the whole vocabulary."""

    def __init__(self, objective: Objective, coefficient: float) -> None:
        self.name = objective.name
        self.objective = objective
        self.coefficient = coefficient

    def needs(self, context: StepContext) -> Needs:
        return replace(self.objective.needs(context), every_token=True)

    def taught(self, advantage: float) -> bool:
        return self.objective.taught(advantage)

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        """Raises `ValueError` where the terms have no entropy."""
        if terms.entropy_T is None:
            raise ValueError("an entropy bonus needs the entropy of the policy")
        loss = self.objective.loss(terms, context)
        return replace(loss, loss_T=loss.loss_T - self.coefficient * terms.entropy_T)
