"""GRPO: the clipped ratio, held near the reference if alpha > 0 (arXiv 2402.03300). No teacher."""

from __future__ import annotations

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import Needs, StepContext, TokenLoss, TokenTerms
from sdpg_megatron.objectives.policy import outcome
from sdpg_megatron.objectives.reference import held


class GRPO:
    """L_out + alpha * L_K."""

    name = "grpo"

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def needs(self, context: StepContext) -> Needs:
        return Needs(reference=self.config.alpha > 0)

    def taught(self, advantage: float) -> bool:
        return False

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        policy = outcome(terms, self.config)
        return policy + held(terms, self.config) if self.config.alpha else policy
