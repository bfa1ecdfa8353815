"""From configuration to objective."""

from __future__ import annotations

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import Objective
from sdpg_megatron.objectives.entropy import EntropyBonus
from sdpg_megatron.objectives.grpo import GRPO
from sdpg_megatron.objectives.schedules import BetaSchedule
from sdpg_megatron.objectives.sdpg import SDPG


def build(config: ObjectiveConfig, total_steps: int) -> Objective:
    """The objective that `config` names, with its entropy bonus, for a run of `total_steps` optimiser steps."""
    objective = _named(config, total_steps)
    return EntropyBonus(objective, config.entropy_coefficient) if config.entropy_coefficient else objective


def _named(config: ObjectiveConfig, total_steps: int) -> Objective:
    match config.name:
        case "sdpg":
            schedule = BetaSchedule.build(config.beta, config.beta_warmup_steps, config.beta_decay_steps, total_steps)
            return SDPG(config, schedule)
        case "grpo":
            return GRPO(config)
