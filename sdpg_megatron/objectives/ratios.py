"""Probability ratios that cannot overflow, whatever two models say about a token. T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import TokenTerms

LOG_RATIO_BOUND = 20.0
"""e^20 = 4.9e8: far beyond every clip, far within float32."""


def bounded_exp(x_T: Tensor) -> Tensor:
    """e^x, going on along its tangent above `LOG_RATIO_BOUND`: value and gradient stay finite and keep their signs."""
    inside_T = x_T.clamp(max=LOG_RATIO_BOUND)
    # `clamp` passes no gradient beyond the bound; there the factor's own is the tangent's slope.
    return inside_T.exp() * (1 + (x_T - inside_T))


def importance_ratio(logprob_T: Tensor, old_logprob_T: Tensor) -> Tensor:
    """rho = pi / pi_old of the sampled tokens; 1 with one optimiser step per rollout."""
    return bounded_exp(logprob_T - old_logprob_T)


def regularizer_weight(terms: TokenTerms, config: ObjectiveConfig) -> Tensor:
    """What the distillation and reference terms are multiplied by: rho without its gradient, or 1."""
    if not config.ratio_weighted_regularizers:
        return torch.ones_like(terms.logprob_T)
    ratio_T = importance_ratio(terms.logprob_T.detach(), terms.old_logprob_T)
    return ratio_T if config.regularizer_ratio_bound is None else ratio_T.clamp(max=config.regularizer_ratio_bound)
