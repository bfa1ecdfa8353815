"""Generating behind the trainer's back, on several replicas."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any
from unittest.mock import patch

from sdpg_megatron.config import ParallelConfig
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rollout.base import Abandoned, Bucket, Sampling, Stop, WeightsWanted
from tests.completions import make_completion
from tests.dist.test_selection import Verifiers
from tests.pool import RankPool

LONG = 60.0
"""Seconds."""


class Engine:
    """Generates when it is let to, or is asked to stop; the first time that it is let to, one group at most."""

    def __init__(self) -> None:
        self.weight_version = 3
        self.streams: list[int] = []
        self.go = threading.Event()
        self.asked = threading.Event()
        self.abandoned = False
        self._calls = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, stop: Stop) -> list[Group]:
        self.asked.set()
        while not self.go.wait(0.01):
            if stop():
                self.abandoned = True
                raise Abandoned
        self._calls += 1
        found = [
            Group(prompt, tuple(make_completion((n,), (-1.0,), "stop", self.weight_version, str(n)) for n in range(2)))
            for prompt in prompts
        ]
        if self._calls == 1:
            raise WeightsWanted("lost", {1: found[1]})
        return found

    def publish(self, version: int, buckets: Iterable[Bucket]) -> None:
        assert not list(buckets)
        self.weight_version = version
        self.streams.append(version)

    def close(self) -> None: ...


def generate_behind() -> Any:
    """Versions of the groups' weights by prompt, and what was published; the prompts of a call that was cancelled."""
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.runtime.background import BackgroundCall
    from sdpg_megatron.train.rollouts import Rollouts

    ranks = parallel.initialize(ParallelConfig(), 0)
    engine = Engine()
    rollouts = Rollouts(ranks, engine, Verifiers())  # type: ignore[arg-type]
    rollouts.publish(3, lambda: [])
    prompts = [Prompt(str(i), (1,), (1,), "") for i in range(4)]
    rollouts.begin(prompts, Sampling(2, 8))
    assert engine.asked.wait(LONG), "it generates while this thread goes on"
    assert not engine.go.is_set()
    rollouts.trained(4)
    engine.go.set()
    groups = rollouts.finish()
    found = [(scored.group.prompt.uid, scored.group.completions[0].weight_version) for scored in groups]

    engine.go.clear()
    engine.asked.clear()
    rollouts.begin(prompts, Sampling(2, 8))
    assert engine.asked.wait(LONG)
    with patch.object(BackgroundCall, "result", side_effect=KeyboardInterrupt), suppress(KeyboardInterrupt):
        rollouts.finish()
    rollouts.close()
    return found, engine.streams, engine.abandoned


def test_servers_that_lost_their_weights_get_the_newest_and_the_rest_is_asked_for(ranks: RankPool) -> None:
    for found, streams, abandoned in ranks.run(generate_behind, 2):
        assert found == [("0", 4), ("1", 3), ("2", 4), ("3", 3)]
        assert streams == [3, 4]
        assert abandoned, "closing ends what goes on, also where the waiting for it was interrupted"
