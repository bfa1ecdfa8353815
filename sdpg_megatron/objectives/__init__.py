"""Training objectives. They take tensors and know nothing of models or ranks."""

from sdpg_megatron.objectives.base import (
    Objective,
    RequiredPasses,
    StepContext,
    TokenLoss,
    TokenMetric,
    TokenTerms,
    sequence_mean,
)
from sdpg_megatron.objectives.distillation import distillation_loss
from sdpg_megatron.objectives.methods import METHODS, build_objective, passes_of_run
from sdpg_megatron.objectives.policy import clipped_ratio, importance_ratio, policy_loss
from sdpg_megatron.objectives.reference import reference_loss

__all__ = [
    "METHODS",
    "Objective",
    "RequiredPasses",
    "StepContext",
    "TokenLoss",
    "TokenMetric",
    "TokenTerms",
    "build_objective",
    "clipped_ratio",
    "distillation_loss",
    "importance_ratio",
    "passes_of_run",
    "policy_loss",
    "reference_loss",
    "sequence_mean",
]
