"""CISPO (arXiv 2506.13585): REINFORCE weighted by the clipped, detached importance ratio.

sdpg-megatron train my.yaml objective.name=examples.objectives.cispo:CISPO objective.options.max_ratio=4
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sdpg_megatron import Objective, StepContext, TokenLoss, TokenMetric, TokenTerms, importance_ratio


class CISPO(Objective):
    """-SG[min(rho, max_ratio)] A log pi(y). Tokens with a clipped ratio keep a gradient."""

    defaults: ClassVar[Mapping[str, object]] = {
        "beta": 0.0,
        "alpha": 0.0,
        "aggregation": "token-mean",
        "options": {"max_ratio": 5.0},
    }

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        ratio_T = importance_ratio(terms.logprob_T.detach(), terms.old_logprob_T)
        bound = float(self.config.options["max_ratio"])
        loss_T = -ratio_T.clamp(max=bound) * terms.advantage_T * terms.logprob_T
        metrics = {
            "policy/loss": TokenMetric(loss_T.detach()),
            "policy/ratio": TokenMetric(ratio_T),
            "policy/clip_high_fraction": TokenMetric((ratio_T > bound).float()),
        }
        return TokenLoss(loss_T, metrics)
