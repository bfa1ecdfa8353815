"""Metrics that declare their reduction.

A rank holds ``dict[str, Metric]``; `merge` combines the metrics of several micro-batches or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Reduction(Enum):
    """Reduction of two values of one metric."""

    MEAN = "mean"
    """Mean weighted by `Metric.weight`, for example by the number of tokens."""
    SUM = "sum"
    MAX = "max"
    MIN = "min"


@dataclass(frozen=True, slots=True)
class Metric:
    """One reported number. `weight` is used by MEAN only; a MEAN of weight 0 is not reported."""

    value: float
    reduction: Reduction = Reduction.MEAN
    weight: float = 1.0


Metrics = Mapping[str, Metric]


def join(left: Metric, right: Metric) -> Metric:
    """Combine two values of a metric.

    Raises:
        ValueError: they declare different reductions.
    """
    if left.reduction is not right.reduction:
        raise ValueError(f"one metric, two reductions: {left.reduction.value} and {right.reduction.value}")
    match left.reduction:
        case Reduction.MEAN:
            weight = left.weight + right.weight
            total = left.value * left.weight + right.value * right.weight
            return Metric(total / weight if weight else 0.0, Reduction.MEAN, weight)
        case Reduction.SUM:
            return Metric(left.value + right.value, Reduction.SUM)
        case Reduction.MAX:
            return Metric(max(left.value, right.value), Reduction.MAX)
        case Reduction.MIN:
            return Metric(min(left.value, right.value), Reduction.MIN)


def merge(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """Combine the metrics of several micro-batches or ranks by name, in the given order."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = join(merged[name], metric) if name in merged else metric
    return merged


def values(metrics: Metrics) -> dict[str, float]:
    """Plain numbers for a report; means of weight 0 are left out."""
    return {
        name: metric.value
        for name, metric in metrics.items()
        if metric.reduction is not Reduction.MEAN or metric.weight > 0
    }
