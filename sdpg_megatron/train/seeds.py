"""Seeds of a run's random draws, derived from the run's seed and a purpose; there is no state to save."""

from __future__ import annotations

import random


def draw_seed(seed: int, purpose: str, data_rank: int) -> int:
    """Seed of one replica's draws; a continued run draws the same numbers."""
    return random.Random(f"{seed}/{purpose}/{data_rank}").getrandbits(63)
