"""GRPO: the clipped ratio, held near the reference if alpha > 0 (arXiv 2402.03300). No teacher."""

from __future__ import annotations

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import RequiredPasses, StepContext, TokenLoss, TokenTerms
from sdpg_megatron.objectives.policy import policy_loss
from sdpg_megatron.objectives.reference import reference_loss


class GRPO:
    """L_out + alpha * L_K."""

    name = "grpo"

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def required_passes(self, context: StepContext) -> RequiredPasses:
        return RequiredPasses(reference=self.config.alpha > 0)

    def distill_enabled(self, advantage: float) -> bool:
        return False

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        policy = policy_loss(terms, self.config)
        return policy + reference_loss(terms, self.config) if self.config.alpha else policy
