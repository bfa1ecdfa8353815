"""Limit on failed verifier calls: training on failure rewards is meaningless."""

from __future__ import annotations

from collections.abc import Sequence

from sdpg_megatron.errors import VerifierError
from sdpg_megatron.records import ScoredGroup


def exceeds(groups: Sequence[ScoredGroup], limit: float | None) -> bool:
    """True if more than the fraction `limit` of the verifier calls failed, or all of them; False without a limit."""
    calls = sum(len(scored.rewards) for scored in groups)
    failures = sum(scored.failures for scored in groups)
    return limit is not None and failures > 0 and (failures == calls or failures > limit * calls)


def check_failures(where: str, groups: Sequence[ScoredGroup], limit: float | None) -> None:
    """Check the verifier calls of a step or an evaluation.

    Args:
        where: step or evaluation, for the error.
        limit: `RewardConfig.failure_limit`; None for no limit.

    Raises:
        VerifierError: as `exceeds`.
    """
    if limit is None or not exceeds(groups, limit):
        return
    calls = sum(len(scored.rewards) for scored in groups)
    failures = sum(scored.failures for scored in groups)
    errors = ((scored.group.prompt.uid, error) for scored in groups for error in scored.errors if error is not None)
    first = next((f"on {uid}: {error}" for uid, error in errors), "without a message")
    raise VerifierError(where, failures, calls, first, limit)
