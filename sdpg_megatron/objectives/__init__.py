"""Pure mathematics of the training objectives."""

from sdpg_megatron.objectives.registry import build, needs_of_run

__all__ = ["build", "needs_of_run"]
