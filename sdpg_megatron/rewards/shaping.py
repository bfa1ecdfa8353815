"""Reward shaping: clipping and overlong penalty, between verifier and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdpg_megatron.config import RewardConfig
from sdpg_megatron.observe.metrics import Metric
from sdpg_megatron.records import Completion


@dataclass(frozen=True, slots=True)
class Shaping:
    """Clips the verifier's reward, then adds the overlong penalty."""

    clip: tuple[float, float] | None
    buffer: int | None
    """Number of tokens over which the penalty grows; None for no penalty."""
    penalty: float
    """Magnitude of the penalty at the length limit."""
    max_tokens: int

    @classmethod
    def build(cls, config: RewardConfig, max_tokens: int) -> Shaping:
        return cls(config.clip, config.overlong_buffer, config.overlong_penalty, max_tokens)

    def shape(self, rewards: Sequence[float], completions: Sequence[Completion]) -> tuple[float, ...]:
        """Shaped rewards of one group."""
        return tuple(
            self._bounded(reward) + self._overlong(completion)
            for reward, completion in zip(rewards, completions, strict=True)
        )

    def describe(self, rewards: Sequence[float], completions: Sequence[Completion]) -> dict[str, Metric]:
        """Shaping metrics of one group; empty if no shaping is configured."""
        if self.clip is None and self.buffer is None:
            return {}
        n = len(rewards)
        found = {"reward/shaped": sum(self.shape(rewards, completions)) / n}
        if self.clip is not None:
            found["reward/clipped"] = sum(self._bounded(reward) != reward for reward in rewards) / n
        if self.buffer is not None:
            penalties = [self._overlong(completion) for completion in completions]
            found["reward/overlong"] = sum(penalty < 0 for penalty in penalties) / n
            found["reward/overlong_penalty"] = sum(penalties) / n
        return {name: Metric(value, weight=n) for name, value in found.items()}

    def _bounded(self, reward: float) -> float:
        return reward if self.clip is None else min(max(reward, self.clip[0]), self.clip[1])

    def _overlong(self, completion: Completion) -> float:
        if self.buffer is None:
            return 0.0
        return self.penalty * overlong_penalty(len(completion.tokens), self.max_tokens, self.buffer)


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    0 up to ``max_tokens - buffer`` tokens, then linear down to -1 at `max_tokens`, and -1 beyond.
    """
    return -min(max(length - (max_tokens - buffer), 0) / buffer, 1.0)
