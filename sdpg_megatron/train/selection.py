"""Which groups a step learns from, and how it gets others for those that it leaves out.

Every rank makes the same choice from the same groups.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdpg_megatron.config import SelectionConfig
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.rewards.filters import EQUAL_REWARDS, equal_rewards, is_kept, load_filters

SURPLUS = "surplus"

Ask = Callable[[int, int], Sequence[ScoredGroup]]
"""(how many, number of the round from 0) -> the groups of the next so many prompts."""
DropReason = str | None
"""Why a group is left out; None for one that is kept."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A step's groups."""

    kept: list[ScoredGroup]
    """In the order of their prompts; as many as were wanted, unless the rounds ran out."""
    asked: list[ScoredGroup]
    """All that were generated for it."""
    rounds: int
    left_out: Mapping[str, int]
    """Groups that were not kept, by reason: one of `EQUAL_REWARDS`, the name of a filter, or `SURPLUS`."""

    def metrics(self) -> dict[str, Metric]:
        counts = {"prompts": len(self.asked), "kept": len(self.kept), "rounds": self.rounds}
        counts |= {f"dropped_{reason}": count for reason, count in self.left_out.items()}
        return {f"selection/{name}": Metric(float(count), Reduction.SUM) for name, count in counts.items()}


def select(ask: Ask, wanted: int, filters_of_step: GroupFilterChain, config: SelectionConfig) -> Selection:
    """Ask for groups, round by round, until `wanted` of them are kept or `config.max_rounds` have passed.

    Nothing is carried over to the next step: what is left out is gone, so a data cursor says all about where a run is.
    """
    kept: list[ScoredGroup] = []
    asked: list[ScoredGroup] = []
    left_out = Counter(dict.fromkeys([*filters_of_step.reasons, SURPLUS], 0))
    rounds = 0
    while len(kept) < wanted and rounds < config.max_rounds:
        groups = ask(math.ceil((wanted - len(kept)) * config.oversample), rounds)
        drop_reasons = filters_of_step(groups)
        asked += groups
        kept += [group for group, drop_reason in zip(groups, drop_reasons, strict=True) if drop_reason is None]
        left_out.update(drop_reason for drop_reason in drop_reasons if drop_reason is not None)
        rounds += 1
    left_out[SURPLUS] = max(0, len(kept) - wanted)
    return Selection(kept[:wanted], asked, rounds, left_out)


class GroupFilterChain:
    """What `SelectionConfig` says about groups. Every rank asks about the same groups and gets the same verdicts."""

    def __init__(self, config: SelectionConfig, ranks: ParallelState) -> None:
        """Raises `ConfigError` where a filter cannot be loaded."""
        self._drop_dead = config.drop_dead
        self._filters = load_filters(config.filters)
        self._ranks = ranks

    @property
    def active(self) -> bool:
        """Whether it leaves anything out."""
        return self._drop_dead or bool(self._filters)

    @property
    def reasons(self) -> list[str]:
        """All that it may give."""
        return [*(EQUAL_REWARDS if self._drop_dead else ()), *map(_name, self._filters)]

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[DropReason]:
        """A verdict on each group.

        Raises:
            FilterError: a filter raised, or returned neither True nor False; on every rank.
        """
        if not self._filters:
            return [self._verdict(group) for group in groups]
        # A filter is asked on one rank alone: one that draws lots, say, must not tell ranks different things.
        return on_main(self._ranks, lambda: [self._verdict(group) for group in groups])

    def _verdict(self, scored: ScoredGroup) -> DropReason:
        if self._drop_dead and (reason := equal_rewards(scored)):
            return reason
        rejected = (spec for spec, keeps in self._filters.items() if not is_kept(spec, keeps, scored))
        return next(map(_name, rejected), None)


def _name(spec: str) -> str:
    return spec.partition(":")[2]
