"""Metrics in the forms that hosts reduce: pairs of a sum and a count, or sums under the host's own weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdpg_megatron.mcore.forward_step import Report
from sdpg_megatron.objectives.base import TokenMetric
from sdpg_megatron.observe.metrics import Metric, Reduction


def sums_and_counts(report: Report, device: torch.device) -> dict[str, Tensor]:
    """Means of a micro-batch's report as tensors [2]: sum and count.

    Megatron-LM adds both over micro-batches and data-parallel ranks, then divides. Sums, minima and maxima have no such
    form and are left out.
    """

    def pair(value: Tensor, weight: Tensor | float) -> Tensor:
        count = torch.as_tensor(weight, dtype=torch.float32, device=device)
        return torch.stack([value.float() * count, count])

    return {name: pair(m.value, m.weight) for name, m in report.items() if m.reduction is Reduction.MEAN}


def pairs(metrics: Mapping[str, Metric], device: torch.device) -> dict[str, Tensor]:
    """Metrics that are merged over all ranks, as tensors [2] of value and 1; see `sums_and_counts`.

    In this form every reduction survives Megatron-LM's. Means of weight 0 are left out.
    """
    known = {name: m for name, m in metrics.items() if m.weight or m.reduction is not Reduction.MEAN}
    return {name: torch.tensor([metric.value, 1.0], device=device) for name, metric in known.items()}


def weighted_sums(metrics: Mapping[str, TokenMetric], weights_T: Tensor) -> dict[str, Tensor]:
    """Per-token metrics summed under a host's token weights, as scalars.

    slime divides such sums by the total weight of the step, so a masked metric becomes a mean over all tokens in which
    the tokens outside the mask count 0. Sums, minima and maxima have no such form and are left out.
    """

    def total(metric: TokenMetric) -> Tensor:
        values_T = metric.values_T.detach().float()
        if metric.mask_T is not None:
            values_T = values_T.where(metric.mask_T, 0.0)
        return (values_T * weights_T).sum()

    return {name: total(metric) for name, metric in metrics.items() if metric.reduction is Reduction.MEAN}
