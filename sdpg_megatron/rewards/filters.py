"""Selection of groups: equal rewards, and custom filters."""

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
EQUAL_REWARDS = ("right", "wrong", "level")
"""Results of `equal_rewards`: all rewards at least 1, all at most 0, or otherwise equal (also after shaping)."""


class GroupFilter(Protocol):
    """Decides if a step trains on a group. It runs in the trainer, on one rank."""

    def __call__(self, group: ScoredGroup) -> bool:
        """Return True to keep the group. An exception ends the run."""
        ...


def equal_rewards(scored: ScoredGroup) -> str | None:
    """Reason in `EQUAL_REWARDS` why a group gives no gradient; None for other groups.

    As in DAPO (arXiv 2503.14476, eq. 8), the rewards of the verifier count: groups that differ only by the overlong
    penalty have equal rewards.
    """
    if len(set(scored.rewards)) > 1 and any(scored.advantages):
        return None
    if min(scored.rewards) >= 1:
        return "right"
    return "wrong" if max(scored.rewards) <= 0 else "level"


def load_filters(specs: Sequence[str]) -> dict[str, GroupFilter]:
    """Load filters by their ``module:function``, in order.

    Raises:
        ConfigError: a filter cannot be found, is async, or does not take exactly one group.
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
    """Apply a filter to a group.

    Raises:
        FilterError: the filter raised, or returned neither True nor False.
    """
    uid = scored.group.prompt.uid
    try:
        kept: object = keeps(scored)
    except Exception as error:
        location = traceback.extract_tb(error.__traceback__)[-1]
        raise FilterError(
            spec, uid, f"{type(error).__name__}: {error} ({location.filename}:{location.lineno})"
        ) from error
    verdict = scalar(kept)
    if not isinstance(verdict, bool):
        raise FilterError(spec, uid, repr(kept))
    return verdict
