"""Gradient norms of the loss terms in the logits, and their ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sdpg_megatron.objectives.base import Objective, StepContext, TokenMetric, TokenTerms
from sdpg_megatron.observe.metrics import Metric, Reduction

RATIO = "distill/gradient_ratio"
_POLICY, _DISTILL = "policy/gradient_square", "distill/gradient_square"


def term_gradients(
    objective: Objective, terms: TokenTerms, context: StepContext, weights_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted loss in log-prob (policy and reference terms) and in divergence, each [T]."""
    divergence_T = torch.zeros_like(terms.logprob_T) if terms.divergence_T is None else terms.divergence_T
    with torch.enable_grad():
        leaves = terms.logprob_T.detach().requires_grad_(), divergence_T.detach().requires_grad_()
        given = replace(terms, logprob_T=leaves[0], divergence_T=leaves[1])
        loss_T = objective.loss(given, context).loss_T * weights_T
        logprob_T, divergence_T = torch.autograd.grad(loss_T.sum(), leaves, materialize_grads=True)
    return logprob_T, divergence_T


def gradient_squares(by_logprob_T: Tensor, by_divergence_T: Tensor) -> dict[str, TokenMetric]:
    """Metrics of each token's two squared gradient norms in the logits, for `gradient_ratio`."""
    return {
        _POLICY: TokenMetric(by_logprob_T, Reduction.SUM),
        _DISTILL: TokenMetric(by_divergence_T, Reduction.SUM),
    }


def gradient_ratio(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """``distill/gradient_ratio`` of a step: norm of the distillation term's gradient in the logits over the norm of the
    policy and reference terms' gradient, over all tokens. Empty if not measured or the latter is 0."""
    if _POLICY not in metrics or not metrics[_POLICY].value:
        return {}
    return {RATIO: Metric(math.sqrt(metrics[_DISTILL].value / metrics[_POLICY].value))}
