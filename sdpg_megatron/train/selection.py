"""Select the groups that a step trains on, and generate more to replace dropped ones.

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

Generate = Callable[[int, int], Sequence[ScoredGroup]]
"""(number of prompts, round from 0) -> one group for each of the next prompts."""
DropReason = str | None
"""Name of the reason; None for a kept group."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Groups of a step."""

    kept: list[ScoredGroup]
    """Groups to train on, in the order of their prompts; fewer than wanted only after the last round."""
    generated: list[ScoredGroup]
    """All groups generated for the step."""
    rounds: int
    dropped: Mapping[str, int]
    """Number of dropped groups by reason: one of `EQUAL_REWARDS`, the name of a filter, or `SURPLUS`."""

    def metrics(self) -> dict[str, Metric]:
        counts = {"prompts": len(self.generated), "kept": len(self.kept), "rounds": self.rounds}
        counts |= {f"dropped_{reason}": count for reason, count in self.dropped.items()}
        return {f"selection/{name}": Metric(float(count), Reduction.SUM) for name, count in counts.items()}


def select(generate: Generate, wanted: int, filters: GroupFilterChain, config: SelectionConfig) -> Selection:
    """Generate groups, round by round, until `wanted` of them are kept or `config.max_rounds` have passed.

    Dropped groups are not carried over to the next step, so the data cursor alone is the state of the data.
    """
    kept: list[ScoredGroup] = []
    generated: list[ScoredGroup] = []
    dropped = Counter(dict.fromkeys([*filters.reasons, SURPLUS], 0))
    rounds = 0
    while len(kept) < wanted and rounds < config.max_rounds:
        groups = generate(math.ceil((wanted - len(kept)) * config.oversample), rounds)
        drop_reasons = filters(groups)
        generated += groups
        kept += [group for group, drop_reason in zip(groups, drop_reasons, strict=True) if drop_reason is None]
        dropped.update(drop_reason for drop_reason in drop_reasons if drop_reason is not None)
        rounds += 1
    dropped[SURPLUS] = max(0, len(kept) - wanted)
    return Selection(kept[:wanted], generated, rounds, dropped)


class GroupFilterChain:
    """Filters of `SelectionConfig`. Every rank passes the same groups and gets the same result."""

    def __init__(self, config: SelectionConfig, ranks: ParallelState) -> None:
        """Raises `ConfigError` if a filter cannot be loaded."""
        self._drop_dead = config.drop_dead
        self._filters = load_filters(config.filters)
        self._ranks = ranks

    @property
    def active(self) -> bool:
        """True if any filter is configured."""
        return self._drop_dead or bool(self._filters)

    @property
    def reasons(self) -> list[str]:
        """Names of all possible drop reasons."""
        return [*(EQUAL_REWARDS if self._drop_dead else ()), *map(_name, self._filters)]

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[DropReason]:
        """Return each group's drop reason.

        Raises:
            FilterError: a filter raised, or returned neither True nor False; on every rank.
        """
        if not self._filters:
            return [self._drop_reason(group) for group in groups]
        # Filters run on one rank: a random filter must not give the ranks different results.
        return on_main(self._ranks, lambda: [self._drop_reason(group) for group in groups])

    def _drop_reason(self, scored: ScoredGroup) -> DropReason:
        if self._drop_dead and (reason := equal_rewards(scored)):
            return reason
        rejected = (spec for spec, keeps in self._filters.items() if not is_kept(spec, keeps, scored))
        return next(map(_name, rejected), None)


def _name(spec: str) -> str:
    return spec.partition(":")[2]
