"""Pure mathematics of the training objectives."""

from sdpg_megatron.objectives.registry import build, passes_of_run

__all__ = ["build", "passes_of_run"]
