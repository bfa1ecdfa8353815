"""How the weight of the distillation term moves over a run."""

from __future__ import annotations

from dataclasses import dataclass

PAPER_WARMUP_SHARE = 50 / 400


@dataclass(frozen=True, slots=True)
class BetaSchedule:
    """beta(k) = peak * min(1, k / warmup) * min(1, (T - k) / decay), k = 1 .. T, without the ramps that have no steps.

    arXiv 2606.04036, section 3.5.2 and algorithm 1. k counts optimizer steps: at the last mini-batch of a rollout it is
    the paper's k times the number of mini-batches.
    """

    peak: float
    warmup_steps: int
    decay_steps: int
    total_steps: int

    @classmethod
    def build(cls, peak: float, warmup_steps: int | None, decay_steps: int | None, total_steps: int) -> BetaSchedule:
        """Where a ramp is None it takes the paper's share: 50 steps of 400 up, and all the others down."""
        if warmup_steps is None:
            warmup_steps = min(round(PAPER_WARMUP_SHARE * total_steps), total_steps - (decay_steps or 0))
        if decay_steps is None:
            decay_steps = total_steps - max(warmup_steps, round(PAPER_WARMUP_SHARE * total_steps))
        return cls(peak, warmup_steps, decay_steps, total_steps)

    def at(self, step: int) -> float:
        """beta(k) of the optimizer step after `step` others, k = `step` + 1; from k = T on a decayed beta is 0."""
        k = step + 1
        rise = min(1.0, k / self.warmup_steps) if self.warmup_steps else 1.0
        fall = min(1.0, max(0.0, (self.total_steps - k) / self.decay_steps)) if self.decay_steps else 1.0
        return self.peak * rise * fall
