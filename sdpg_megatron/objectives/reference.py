"""The reference loss: a penalty on r = log(pi / pi_ref) of the sampled token, for a frozen reference policy.

| mode | value         | derivative in r |
|------|---------------|-----------------|
| urkl | r^2 / 2       | r               |
| ufkl | exp(-r) + r   | 1 - exp(-r)     |
| fkl  | exp(-r)       | -exp(-r)        |
| rkl  | (r + 1)^2 / 2 | r + 1           |

The names are those of the divergences (reverse and forward KL, u for unnormalized; arXiv 2606.04036) whose gradients
these derivatives estimate under pi; the values do not estimate the divergences. T response tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import TokenLoss, TokenMetric, TokenTerms
from sdpg_megatron.objectives.policy import LOG_RATIO_BOUND, bounded_exp, regularizer_weight

Mode = Literal["urkl", "ufkl", "fkl", "rkl"]


def reference_value(mode: Mode, log_ratio_T: Tensor) -> Tensor:
    """The table's value. exp(-r) is continued by its tangent below r = -20, before its gradient overflows."""
    match mode:
        case "urkl":
            return log_ratio_T.square() / 2
        case "ufkl":
            return bounded_exp(-log_ratio_T) + log_ratio_T
        case "fkl":
            return bounded_exp(-log_ratio_T)
        case "rkl":
            return (log_ratio_T + 1).square() / 2


def reference_term(mode: Mode, logprob_T: Tensor, reference_logprob_T: Tensor) -> TokenLoss:
    """Per-token value. Metrics: KL(pi || pi_ref) as exp(-r) - 1 + r, and the fraction of tokens beyond the bound."""
    log_ratio_T = logprob_T - reference_logprob_T
    value_T = reference_value(mode, log_ratio_T)
    r_T = log_ratio_T.detach()
    metrics = {
        "reference/loss": value_T.detach(),
        "reference/kl": bounded_exp(-r_T) - 1 + r_T,
        "reference/bounded_fraction": (r_T < -LOG_RATIO_BOUND).to(r_T.dtype),
    }
    return TokenLoss(value_T, {name: TokenMetric(values_T) for name, values_T in metrics.items()})


def reference_loss(terms: TokenTerms, config: ObjectiveConfig) -> TokenLoss:
    """alpha times the term `config.reference`, with the regularizers' ratio weight.

    Raises:
        ValueError: the terms have no reference log-probs.
    """
    if terms.reference_logprob_T is None:
        raise ValueError("alpha > 0 needs the log-probs of the reference")
    term = reference_term(config.reference, terms.logprob_T, terms.reference_logprob_T)
    return TokenLoss(config.alpha * regularizer_weight(terms, config) * term.loss_T, term.metrics)
