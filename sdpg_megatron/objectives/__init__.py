"""Pure mathematics of the training objectives."""

from sdpg_megatron.objectives.registry import build

__all__ = ["build"]
