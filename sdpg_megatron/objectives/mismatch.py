"""Train-inference mismatch: log-prob differences between trainer and rollout engine, and their correction.

The importance weight of a token is w = pi(y) / mu(y), with pi the trainer's probability under the weights that
generated the response, and mu the rollout engine's. T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed import ProcessGroup

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import TokenMetric, mean_by_sequence
from sdpg_megatron.objectives.policy import bounded_exp
from sdpg_megatron.observe.metrics import Metric, Reduction

DIFFERENCE = "rollout/logprob_diff_mean"
_WEIGHT, _SQUARE = "rollout/weight_mean", "rollout/weight_square_mean"


def mismatch(old_logprob_T: Tensor, rollout_logprob_T: Tensor) -> dict[str, TokenMetric]:
    """Metrics of the difference between training and rollout log-probs, under the same weights.

    Mean and largest |log pi - log mu|; KL(mu || pi) by the estimator w - 1 - ln w, which is never negative; and the
    mean weights that `effective_sample_size` reads.
    """
    log_weight_T = old_logprob_T - rollout_logprob_T
    weight_T = bounded_exp(log_weight_T)
    return {
        DIFFERENCE: TokenMetric(log_weight_T.abs()),
        "rollout/logprob_diff_max": TokenMetric(log_weight_T.abs(), Reduction.MAX),
        "rollout/kl": TokenMetric(weight_T - 1 - log_weight_T),
        _WEIGHT: TokenMetric(weight_T),
        _SQUARE: TokenMetric(weight_T.square()),
    }


def effective_sample_size(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """``rollout/effective_sample_size``, the share (sum w)^2 / (T sum w^2) of a whole step; nothing over no tokens."""
    if _WEIGHT not in metrics or not metrics[_WEIGHT].weight:
        return {}
    mean, square = metrics[_WEIGHT], metrics[_SQUARE]
    return {"rollout/effective_sample_size": Metric(mean.value**2 / square.value, weight=mean.weight)}


def correction(
    old_logprob_T: Tensor,
    rollout_logprob_T: Tensor,
    config: ObjectiveConfig,
    *,
    sequence_T: Tensor,
    sequences: int,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Importance-sampling factor of each token's loss, by `config.correction` ("truncate" or "mask").

    Truncated importance sampling (Ionides 2008; per token for language models in the blog post "Your efficient RL
    framework secretly brings you off-policy RL training", 2025), or with "mask" the weight within the bound and 0
    outside. With `correction_level` "sequence" all tokens of a response get the geometric mean of their weights.

    Args:
        sequence_T: int64, index of each token's response, below `sequences`.
        group: ranks that the responses' tokens are sharded over, all of which call this; None for this rank alone.
    """
    log_weight_T = old_logprob_T - rollout_logprob_T
    if config.correction_level == "sequence":
        log_weight_T = mean_by_sequence(log_weight_T, sequence_T, sequences, group)
    weight_T, bound = bounded_exp(log_weight_T), config.correction_bound
    if config.correction == "truncate":
        return weight_T.clamp(max=bound)
    return weight_T.masked_fill((weight_T > bound) | (weight_T < 1 / bound), 0)
