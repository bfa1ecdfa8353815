"""Trainer and rollout engine compute the same model, but not the same bits: how far apart, and what is done about it.

The importance weight of a token is w = pi(y) / mu(y), with pi the probability in training, under the weights that the
response was sampled from, and mu the one that the rollout engine gave. T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import TokenMetric
from sdpg_megatron.objectives.ratios import bounded_exp
from sdpg_megatron.observe.metrics import Metric, Reduction

DIFFERENCE = "rollout/logprob_diff_mean"
_WEIGHT, _SQUARE = "rollout/weight_mean", "rollout/weight_square_mean"


def mismatch(old_logprob_T: Tensor, rollout_logprob_T: Tensor) -> dict[str, TokenMetric]:
    """How far training and rollout disagree about the same tokens under the same weights.

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
    """What each token's loss is multiplied by, as `config.correction` says, which is not "none".

    Truncated importance sampling (Ionides 2008; per token for language models in the blog post "Your efficient RL
    framework secretly brings you off-policy RL training", 2025), or with "mask" the weight within the bound and 0
    outside. With `correction_level` "sequence" all tokens of a response get the geometric mean of their weights.

    Args:
        sequence_T: int64, which of `sequences` responses each token is of.
        group: ranks that the responses' tokens are spread over, all of which call this; None for this one alone.
    """
    log_weight_T = old_logprob_T - rollout_logprob_T
    if config.correction_level == "sequence":
        log_weight_T = _mean_within(log_weight_T, sequence_T, sequences, group)
    weight_T, bound = bounded_exp(log_weight_T), config.correction_bound
    if config.correction == "truncate":
        return weight_T.clamp(max=bound)
    return weight_T.masked_fill((weight_T > bound) | (weight_T < 1 / bound), 0)


def _mean_within(values_T: Tensor, sequence_T: Tensor, sequences: int, group: ProcessGroup | None) -> Tensor:
    """Each value's mean over its sequence."""
    counted_T2 = torch.stack((values_T, torch.ones_like(values_T)), dim=1)
    sums_B2 = values_T.new_zeros(sequences, 2).index_add_(0, sequence_T, counted_T2)
    if group is not None:
        dist.all_reduce(sums_B2, group=group)
    return (sums_B2[:, 0] / sums_B2[:, 1].clamp(min=1))[sequence_T]
