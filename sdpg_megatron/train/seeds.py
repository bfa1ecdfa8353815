"""Seeds of a run's random draws: each follows from the run's seed and the draw's purpose, and none from a state."""

from __future__ import annotations

import random


def draw_seed(seed: int, purpose: str, data_rank: int) -> int:
    """A seed for one replica's draws, so that a continued run draws what it would have drawn."""
    return random.Random(f"{seed}/{purpose}/{data_rank}").getrandbits(63)
