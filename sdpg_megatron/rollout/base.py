"""What a rollout engine is: it generates with log-probs, takes new weights, and says which weights it used."""

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
"""Called with the number of finished groups, and of all."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `temperature` 0 means greedy; its log-probs are those of temperature 1."""

    n: int
    """Responses per prompt."""
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    """The same seed, prompts and weights give the same responses."""
    experts: bool = False
    """Record which experts of a mixture each token is sent to."""


def compact(experts: Any) -> Routing:
    """An array of expert numbers in the narrowest type that holds them."""
    narrow: Routing = experts.astype(np.uint8 if experts.size == 0 or experts.max() < 256 else np.int16)
    return narrow


Stop = Callable[[], bool]
"""Whether the caller wants what is under way to end; asked often, from any thread."""


def never() -> bool:
    """A `Stop` of callers that wait for the end."""
    return False


class Abandoned(RolloutError):
    """The caller wanted the generation to end. What was generated of it is gone; the engine is as it was before."""

    def __init__(self) -> None:
        super().__init__("the generation was abandoned, as the run was asked to stop")


class WeightsWanted(RolloutError):
    """No server has the current weights, though some are there to take them: publish the same version again.

    The groups that were finished before are kept in `done`, by their prompt's place in the call.
    """

    def __init__(self, message: str, done: Mapping[int, Group]) -> None:
        super().__init__(message)
        self.done = dict(done)


class RolloutEngine(Protocol):
    """A source of completions that follows the trainer's weights."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next sample will come from; -1 before the first publish."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Stop = never) -> list[Group]:
        """One whole group of `sampling.n` completions for each prompt, in order.

        Raises:
            Abandoned: soon after `stop` says so.
            RolloutError: no weights were published yet, or a group could not be completed.
            WeightsWanted: the current weights have to be published again, and then the rest asked for.
        """
        ...

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Replace every weight with the stream's. The engine serves `version` only when the whole stream arrived.

        Raises:
            WeightError: a name or shape is unknown to the engine, or a weight of the engine is missing from the
                stream. The engine then refuses to generate until a later publish succeeds.
        """
        ...

    def close(self) -> None:
        """Release everything. A closed engine generates nothing; closing twice is harmless."""
        ...


@runtime_checkable
class SharedEngine(RolloutEngine, Protocol):
    """An engine on servers that other processes' engines use too. One process of a run publishes to them."""

    def follow(self, version: int) -> None:
        """Another process published a version: take only its responses from now on."""
        ...

    def verify(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Compare the weights of every server that serves `version` with the stream's.

        Raises:
            WeightError: they differ; names servers and tensors.
        """
        ...

    def release(self) -> None:
        """Have the servers give their memory back; they have no weights until `resume` and the next publish."""
        ...

    def resume(self) -> None:
        """Have the servers take memory for their weights."""
        ...
