"""Rollout engine protocol: generation with log-probs, weight updates, weight versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from sdpg_megatron.errors import RolloutError
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.weights import Bucket as Bucket

if TYPE_CHECKING:
    from sdpg_megatron.records import Routing

OnProgress = Callable[[int, int], None]
"""Called with the numbers of finished and of all groups."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. `temperature` 0 is greedy, with the log-probs of temperature 1."""

    n: int
    """Responses per prompt."""
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    """Equal seeds, prompts and weights give equal responses."""
    experts: bool = False
    """Record the experts that each token is routed to."""


def compact(experts: Any) -> Routing:
    """Convert expert numbers to the narrowest type that holds them."""
    narrow: Routing = experts.astype(np.uint8 if experts.size == 0 or experts.max() < 256 else np.int16)
    return narrow


Stop = Callable[[], bool]
"""Returns True to end the current generation; called often, from any thread."""


def never() -> bool:
    """A `Stop` that never ends the generation."""
    return False


class Abandoned(RolloutError):
    """The caller stopped the generation. Its output is lost; the engine is unchanged."""

    def __init__(self) -> None:
        super().__init__("the generation was abandoned, as the run was asked to stop")


class WeightsWanted(RolloutError):
    """No server has the current weights, but some can take them: publish the same version again.

    `done` has the finished groups by their prompt's index in the call.
    """

    def __init__(self, message: str, done: Mapping[int, Group]) -> None:
        super().__init__(message)
        self.done = dict(done)


class RolloutEngine(Protocol):
    """Generates completions with the trainer's weights."""

    @property
    def weight_version(self) -> int:
        """Weight version of the next sample; -1 before the first publish."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Stop = never) -> list[Group]:
        """Generate a group of `sampling.n` completions for each prompt, in order.

        Raises:
            Abandoned: soon after `stop` returns True.
            RolloutError: no weights were published yet, or a group could not be completed.
            WeightsWanted: publish the current weights again, then request the rest.
        """
        ...

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Replace all weights with the stream's. The engine serves `version` only after the whole stream.

        Raises:
            WeightError: a tensor of the stream is unknown, misshapen, duplicate, or missing. The engine then refuses to
                generate until a later publish succeeds.
        """
        ...

    def close(self) -> None:
        """Free all resources. May be called twice."""
        ...


@runtime_checkable
class SharedEngine(RolloutEngine, Protocol):
    """An engine on servers shared with other processes' engines. One process of a run publishes to them."""

    def follow(self, version: int) -> None:
        """Accept only responses of a version that another process published."""
        ...

    def verify(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Verify the weights of every server that serves `version` by publishing the stream again. Raises `WeightError`
        naming servers and parameters that differ."""
        ...

    def release(self) -> None:
        """Release the servers' memory. They serve nothing until `resume` and the next publish."""
        ...

    def resume(self) -> None:
        """Allocate the servers' memory for weights."""
        ...
