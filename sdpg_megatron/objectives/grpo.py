"""GRPO: the outcome term, held near the reference if alpha > 0. No teacher."""

from __future__ import annotations

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import Needs, StepContext, TokenLoss, TokenTerms
from sdpg_megatron.objectives.policy import outcome
from sdpg_megatron.objectives.ratios import regularizer_weight
from sdpg_megatron.objectives.reference import reference_term


class GRPO:
    """L_out + alpha * L_K."""

    name = "grpo"

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def needs(self, context: StepContext) -> Needs:
        return Needs(reference=self.config.alpha > 0)

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        policy = outcome(terms, self.config)
        if not self.config.alpha:
            return policy
        if terms.reference_logprob_T is None:
            raise ValueError("alpha > 0 needs the log-probs of the reference")
        held = reference_term(self.config.reference, terms.logprob_T, terms.reference_logprob_T)
        loss_T = policy.loss_T + self.config.alpha * regularizer_weight(terms, self.config) * held.loss_T
        return TokenLoss(loss_T, {**policy.metrics, **held.metrics})
