"""Which groups teach: dead ones, and filters of the user's."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from sdpg_megatron.config.external import load_object
from sdpg_megatron.errors import ConfigError, FilterError
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.rewards.conventions import describe_signature, is_callable_class, scalar, takes
from sdpg_megatron.rewards.load import instantiate

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
    """The filters, by their ``module:function``, in order.

    Raises:
        ConfigError: a filter cannot be found, is async, or does not take one group alone.
    """
    return {spec: _load_filter(spec) for spec in specs}


def _load_filter(spec: str) -> GroupFilter:
    target = load_object(FIELD, spec)
    if isinstance(target, type) and is_callable_class(target):
        target = instantiate(FIELD, spec, target)
    if isinstance(target, type) or _is_async(target) or not takes(target, 1):
        expected = "f(group) -> bool, or a class with such a __call__; not async"
        fix = "give it this signature; further parameters need defaults"
        raise ConfigError(FIELD, f"{spec}{describe_signature(target)}", expected, fix)
    return cast(GroupFilter, target)


def _is_async(target: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)


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
    verdict = scalar(kept)
    if not isinstance(verdict, bool):
        raise FilterError(spec, uid, repr(kept))
    return verdict
