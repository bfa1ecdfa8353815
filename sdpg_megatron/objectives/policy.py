"""The policy loss: it raises the log-prob of responses with positive advantage. T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import TokenLoss, TokenMetric, TokenTerms

LOG_RATIO_BOUND = 20.0
"""e^20 = 4.9e8: far above every clip, far within float32."""


def bounded_exp(x_T: Tensor) -> Tensor:
    """e^x, continued by its tangent above `LOG_RATIO_BOUND`: value and gradient stay finite and keep their signs."""
    inside_T = x_T.clamp(max=LOG_RATIO_BOUND)
    # `clamp` passes no gradient beyond the bound; there the factor's own is the tangent's slope.
    return inside_T.exp() * (1 + (x_T - inside_T))


def importance_ratio(logprob_T: Tensor, old_logprob_T: Tensor) -> Tensor:
    """rho = pi / pi_old of the sampled tokens; 1 with one optimizer step per rollout."""
    return bounded_exp(logprob_T - old_logprob_T)


def regularizer_weight(terms: TokenTerms, config: ObjectiveConfig) -> Tensor:
    """Factor of the distillation and reference terms: detached rho, or 1."""
    if not config.ratio_weighted_regularizers:
        return torch.ones_like(terms.logprob_T)
    ratio_T = importance_ratio(terms.logprob_T.detach(), terms.old_logprob_T)
    return ratio_T if config.regularizer_ratio_bound is None else ratio_T.clamp(max=config.regularizer_ratio_bound)


def policy_loss(terms: TokenTerms, config: ObjectiveConfig) -> TokenLoss:
    """The policy loss that `config.policy` selects."""
    if config.policy == "reinforce":
        return reinforce(terms.logprob_T, terms.advantage_T)
    surrogate = clipped_ratio(
        terms.logprob_T,
        terms.old_logprob_T,
        terms.advantage_T,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    return clipped_reinforce(terms.logprob_T, surrogate) if config.policy == "clipped_reinforce" else surrogate


def reinforce(logprob_T: Tensor, advantage_T: Tensor) -> TokenLoss:
    """-A log pi(y)."""
    loss_T = -advantage_T * logprob_T
    return TokenLoss(loss_T, {"policy/loss": TokenMetric(loss_T.detach())})


def clipped_reinforce(logprob_T: Tensor, surrogate: TokenLoss) -> TokenLoss:
    """SG[l_clip] log pi(y), with l_clip the value of `surrogate` (arXiv 2606.04036, appendix A.3).

    Tokens with a clipped ratio keep a gradient, of the clipped size. With rho = 1 the gradient is REINFORCE's.
    """
    loss_T = surrogate.loss_T.detach() * logprob_T
    return TokenLoss(loss_T, {**surrogate.metrics, "policy/loss": TokenMetric(loss_T.detach())})


def clipped_ratio(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> TokenLoss:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), and where A < 0 at most -dual_clip A.

    PPO's surrogate (arXiv 1707.06347, eq. 7) with DAPO's two bounds (2503.14476) and the dual clip of 1912.09729. With
    rho = 1 its gradient is REINFORCE's.
    """
    ratio_T = importance_ratio(logprob_T, old_logprob_T)
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = torch.maximum(-advantage_T * ratio_T, -advantage_T * clipped_T)
    negative_T, rho_T = advantage_T < 0, ratio_T.detach()
    bounded_T = torch.zeros_like(negative_T)
    if dual_clip is not None:
        bounded_T = negative_T & (rho_T > dual_clip)
        loss_T = torch.where(negative_T, torch.minimum(loss_T, -advantage_T * dual_clip), loss_T)
    metrics = {
        "policy/loss": loss_T.detach(),
        "policy/ratio": rho_T,
        "policy/clip_low_fraction": negative_T & (rho_T < 1 - clip_low),
        "policy/clip_high_fraction": (advantage_T > 0) & (rho_T > 1 + clip_high),
        "policy/dual_clip_fraction": bounded_T,
        "policy/ratio_bounded_fraction": (logprob_T - old_logprob_T).detach() > LOG_RATIO_BOUND,
    }
    return TokenLoss(loss_T, {name: TokenMetric(values_T.to(loss_T.dtype)) for name, values_T in metrics.items()})
