"""Compare evaluations side by side, paired by problem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from sdpg_megatron.errors import EvaluationError
from sdpg_megatron.evaluation.estimators import Estimate, bootstrap
from sdpg_megatron.evaluation.results import Evaluation
from sdpg_megatron.evaluation.scores import per_problem
from sdpg_megatron.evaluation.table import scores_table

FREE = ("seed", "model.dtype", "rollout.engine", "reward.timeout", "eval.responses")
"""Settings in which compared evaluations may differ. They do not change the measured quantity."""


def compare(evaluations: Sequence[Evaluation], *, anyway: bool = False) -> dict[str, Table]:
    """Table of each data file, by its name.

    Args:
        evaluations: at least one; the others are compared with the first.
        anyway: allow different data and settings.

    Raises:
        EvaluationError: names the first difference in data or settings.
    """
    first, *others = evaluations
    for other in others:
        if not anyway and (difference := first.request.difference(other.request, FREE)):
            name, expected, found = difference
            fix = "evaluate both with equal data and settings, or use --anyway"
            raise EvaluationError(str(other.folder), f"{name}: {found}", f"{expected}, as in {first.folder}", fix)
    return {name: _compare_on(name, evaluations) for evaluation in evaluations for name in evaluation.scores}


def _compare_on(name: str, evaluations: Sequence[Evaluation]) -> Table:
    selected = [evaluation for evaluation in evaluations if name in evaluation.scores]
    scores = {f"{evaluation.folder}\n{evaluation.request.model}": evaluation.scores[name] for evaluation in selected}
    return scores_table(scores, [_difference(name, selected[0], evaluation) for evaluation in selected])


def _difference(name: str, first: Evaluation, other: Evaluation) -> dict[str, Estimate]:
    """Paired differences of `other` minus `first`; empty if they have different problems."""
    if other is first or first.request.data[name] != other.request.data[name]:
        return {}
    columns = [per_problem(e.problems(name), e.request.settings["eval.k"]) for e in (first, other)]
    common = [quantity for quantity in columns[0] if quantity in columns[1]]
    values_PM = np.stack([columns[1][quantity] - columns[0][quantity] for quantity in common], axis=1)
    estimates = bootstrap(values_PM, seed=first.request.settings["seed"])
    return dict(zip(common, estimates, strict=True))
