"""RPG: SDPG's outcome and reference terms without the distillation (arXiv 2606.04036, beta = 0)."""

from __future__ import annotations

from sdpg_megatron.objectives.grpo import GRPO


class RPG(GRPO):
    name = "rpg"
