"""SDPG with leave-one-out advantages (RLOO, arXiv 2402.14740): a response's baseline is the mean of the others.

sdpg-megatron train my.yaml objective.name=examples.objectives.leave_one_out:LeaveOneOut
"""

from __future__ import annotations

from collections.abc import Sequence

from sdpg_megatron import SDPG


class LeaveOneOut(SDPG):
    """SDPG's loss with A_i = R_i - mean of the other rewards of the group."""

    def advantages(self, rewards_G: Sequence[float]) -> tuple[float, ...]:
        if len(set(rewards_G)) == 1:  # exactly 0: a rounding error must not open a gate
            return (0.0,) * len(rewards_G)
        total, others = sum(rewards_G), len(rewards_G) - 1
        return tuple(reward - (total - reward) / others for reward in rewards_G)
