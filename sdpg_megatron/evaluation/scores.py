"""Scores of an evaluation, from the results of its problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sdpg_megatron.evaluation.estimators import Array, Estimate, best_at, bootstrap, majority_at
from sdpg_megatron.evaluation.problems import Problem


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one data file."""

    problems: int
    failures: int
    """Number of failed verifier calls, sampled and greedy together."""
    estimates: Mapping[str, Estimate]
    """Estimates by name: pass@k, majority@k, greedy, length, truncated."""


def score(problems: Sequence[Problem], ks: Sequence[int], *, seed: int) -> Scores:
    """Compute the scores of at least one problem.

    Args:
        ks: values of k for pass@k and majority@k; pass@1 is always included.
        seed: seed of the bootstrap.
    """
    columns = per_problem(problems, ks)
    estimates = bootstrap(np.stack(list(columns.values()), axis=1), seed=seed)
    return Scores(
        problems=len(problems),
        failures=sum(problem.sampled.failures + problem.greedy.failures for problem in problems),
        estimates=dict(zip(columns, estimates, strict=True)),
    )


def per_problem(problems: Sequence[Problem], ks: Sequence[int]) -> dict[str, Array]:
    """Value of each quantity per problem, float64 [P]; the estimate is its mean."""
    columns = {f"pass@{k}": [best_at(p.sampled.rewards, k) for p in problems] for k in sorted({1, *ks})}
    for k in sorted(set(ks) - {1}):
        votes = [
            majority_at(p.sampled.answers, p.sampled.rewards, k) for p in problems if p.sampled.answers is not None
        ]
        if len(votes) == len(problems):
            columns[f"majority@{k}"] = votes
    columns["greedy"] = [p.greedy.rewards[0] for p in problems]
    columns["length"] = [_mean(p.sampled.lengths) for p in problems]
    columns["truncated"] = [_mean(p.sampled.truncated) for p in problems]
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
