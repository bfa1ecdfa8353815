"""From configuration to objective."""

from __future__ import annotations

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives.base import Objective, RequiredPasses, StepContext
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


def passes_of_run(objective: Objective, total_steps: int) -> RequiredPasses:
    """The passes that any step of a run needs, from a few of its steps: see `Objective.needs`."""
    probes = {step for step in (0, 1, total_steps // 2, total_steps - 1) if 0 <= step < total_steps}
    steps = [objective.required_passes(StepContext(step, total_steps)) for step in sorted(probes)]
    return RequiredPasses(
        teacher=any(required_passes.teacher for required_passes in steps),
        teacher_logprob=any(required_passes.teacher_logprob for required_passes in steps),
        reference=any(required_passes.reference for required_passes in steps),
        every_token=any(required_passes.every_token for required_passes in steps),
        policy_loss=any(required_passes.policy_loss for required_passes in steps),
    )
