"""The limit on verifier calls that fail: rewards that nearly all come from failures teach nothing."""

from __future__ import annotations

from collections.abc import Sequence

from sdpg_megatron.errors import VerifierError
from sdpg_megatron.records import ScoredGroup


def exceeds(groups: Sequence[ScoredGroup], limit: float | None) -> bool:
    """Tell whether more than the share `limit` of the verifier calls on the groups failed, or all; None is no limit."""
    calls = sum(len(scored.rewards) for scored in groups)
    failures = sum(scored.failures for scored in groups)
    return limit is not None and failures > 0 and (failures == calls or failures > limit * calls)


def check_failures(where: str, groups: Sequence[ScoredGroup], limit: float | None) -> None:
    """Check the verifier calls on a step's, or an evaluation's, groups.

    Args:
        where: what the groups are of, for the error.
        limit: `RewardConfig.failure_limit`; None checks nothing.

    Raises:
        VerifierError: more than that share of the calls failed, or all of them.
    """
    if limit is None or not exceeds(groups, limit):
        return
    calls = sum(len(scored.rewards) for scored in groups)
    failures = sum(scored.failures for scored in groups)
    errors = ((scored.group.prompt.uid, error) for scored in groups for error in scored.errors if error is not None)
    first = next((f"on {uid}: {error}" for uid, error in errors), "without a message")
    raise VerifierError(where, failures, calls, first, limit)
