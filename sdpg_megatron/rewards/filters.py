"""Which groups teach: dead ones, and filters of the user's."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np

from sdpg_megatron.errors import FilterError
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.rewards.load import load_function

FIELD = "selection.filters"
DEAD = ("right", "wrong", "level")
"""Why a group is dead: all its rewards at least 1, at most 0, or equal in between; or equal once they were shaped."""


class GroupFilter(Protocol):
    """Says whether a step learns from a group. It runs in the trainer, on one rank."""

    def __call__(self, group: ScoredGroup) -> bool:
        """True keeps the group. Whatever it raises ends the run."""
        ...


def dead(scored: ScoredGroup) -> str | None:
    """Why a group teaches nothing, one of `DEAD`; None where it does.

    As in DAPO (arXiv 2503.14476, eq. 8), what counts is the verifier's word: a penalty for length alone brings no group
    to life.
    """
    if len(set(scored.rewards)) > 1 and any(scored.advantages):
        return None
    if min(scored.rewards) >= 1:
        return "right"
    return "wrong" if max(scored.rewards) <= 0 else "level"


def load_filters(specs: Sequence[str]) -> dict[str, GroupFilter]:
    """The filters, by their ``module:function``, in order. Raises `ConfigError`."""
    return {spec: cast(GroupFilter, load_function(FIELD, spec)) for spec in specs}


def is_kept(spec: str, keeps: GroupFilter, scored: ScoredGroup) -> bool:
    """What the filter of that name says of a group.

    Raises:
        FilterError: it raised, or returned neither True nor False.
    """
    uid = scored.group.prompt.uid
    try:
        kept: object = keeps(scored)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise FilterError(spec, uid, f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})") from error
    if not isinstance(kept, bool | np.bool_):
        raise FilterError(spec, uid, repr(kept))
    return bool(kept)
