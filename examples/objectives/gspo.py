"""GSPO (arXiv 2507.18071): one importance ratio per response, clipped as a whole.

sdpg-megatron train my.yaml objective.name=examples.objectives.gspo:GSPO optimizer.minibatches=4
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from sdpg_megatron import Objective, StepContext, TokenLoss, TokenMetric, TokenTerms, sequence_mean


class GSPO(Objective):
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), with s = exp(mean over the response of log pi / pi_old).

    The gradient reaches each token by s * pi / SG[pi] (the paper's GSPO-token), which equals the gradient of s
    if all tokens of a response share the advantage.
    """

    reads_sequences = True
    defaults: ClassVar[Mapping[str, object]] = {
        "beta": 0.0,
        "alpha": 0.0,
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence-mean",
    }

    def loss(self, terms: TokenTerms, context: StepContext) -> TokenLoss:
        ratio_T = sequence_mean(terms.logprob_T - terms.old_logprob_T, terms).exp()
        token_T = ratio_T * (terms.logprob_T - terms.logprob_T.detach()).exp()
        clipped_T = token_T.clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        loss_T = torch.maximum(-token_T * terms.advantage_T, -clipped_T * terms.advantage_T)
        metrics = {
            "policy/loss": TokenMetric(loss_T.detach()),
            "policy/ratio": TokenMetric(ratio_T),
            "policy/clip_fraction": TokenMetric((clipped_T != token_T).float()),
        }
        return TokenLoss(loss_T, metrics)
