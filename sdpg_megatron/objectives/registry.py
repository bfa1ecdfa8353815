"""From configuration to objective."""

from __future__ import annotations

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import Needs, Objective, StepContext
from sdpg_megatron.objectives.dapo import DAPO
from sdpg_megatron.objectives.entropy import EntropyBonus
from sdpg_megatron.objectives.grpo import GRPO
from sdpg_megatron.objectives.opcd import OPCD
from sdpg_megatron.objectives.opsd import OPSD
from sdpg_megatron.objectives.rlsd import RLSD
from sdpg_megatron.objectives.rpg import RPG
from sdpg_megatron.objectives.schedules import BetaSchedule
from sdpg_megatron.objectives.sdpg import SDPG
from sdpg_megatron.objectives.sdpo import SDPO

UNSCHEDULED = {method.name: method for method in (GRPO, DAPO, RPG, RLSD)}
SCHEDULED = {method.name: method for method in (SDPG, OPSD, OPCD, SDPO)}
"""Methods whose distillation term has a weight that moves over the run."""


def build(config: ObjectiveConfig, total_steps: int) -> Objective:
    """The objective that `config` names, with its entropy bonus, for a run of `total_steps` optimiser steps."""
    objective = _named(config, total_steps)
    return EntropyBonus(objective, config.entropy_coefficient) if config.entropy_coefficient else objective


def _named(config: ObjectiveConfig, total_steps: int) -> Objective:
    if config.name in UNSCHEDULED:
        return UNSCHEDULED[config.name](config)
    schedule = BetaSchedule.build(config.beta, config.beta_warmup_steps, config.beta_decay_steps, total_steps)
    return SCHEDULED[config.name](config, schedule)


def needs_of_run(objective: Objective, total_steps: int) -> Needs:
    """The passes that any step of a run needs, from a few of its steps: see `Objective.needs`."""
    probes = {step for step in (0, 1, total_steps // 2, total_steps - 1) if 0 <= step < total_steps}
    steps = [objective.needs(StepContext(step, total_steps)) for step in sorted(probes)]
    return Needs(
        teacher=any(needs.teacher for needs in steps),
        teacher_logprob=any(needs.teacher_logprob for needs in steps),
        reference=any(needs.reference for needs in steps),
        every_token=any(needs.every_token for needs in steps),
        outcome=any(needs.outcome for needs in steps),
    )
