"""`sdpg-megatron`, but killed (SIGKILL) at the moment that $SDPG_TEST_DEATH names, as ``moment:count``.

The moment is a place in the code, the count how often it has to be passed; "writer" is the forked process that writes
a checkpoint, which takes the trainer with it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sdpg_megatron.checkpoint import writing
from sdpg_megatron.checkpoint.state import RunState
from sdpg_megatron.checkpoint.store import CheckpointStore
from sdpg_megatron.cli import main
from sdpg_megatron.mcore.learner import Learner
from sdpg_megatron.observe.writers import MultiWriter
from sdpg_megatron.train.loop import Trainer

VARIABLE = "SDPG_TEST_DEATH"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(owner: Any, name: str, count: int) -> None:
    """Once `owner.name` has been called `count` times."""
    inner: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = inner(*arguments, **options)
        if calls == count:
            die()
        return result

    setattr(owner, name, counted)


def die_while_writing(count: int) -> None:
    """The `count`-th checkpoint's writer, once it has begun the file; and then the trainer, its parent."""
    trainer, inner = os.getpid(), writing.seal
    calls = 0

    def killing(path: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            path.write_bytes(path.read_bytes()[:1000])
            os.kill(trainer, signal.SIGKILL)
            die()
        return inner(path)

    writing.seal = killing


MOMENTS: dict[str, Callable[[int], None]] = {
    "update": lambda count: die_after(Learner, "update", count),
    "reported": lambda count: die_after(MultiWriter, "write", count),
    "begun": lambda count: die_after(Trainer, "_save", count),
    "writer": die_while_writing,
    "manifest": lambda count: die_after(RunState, "write", count),
    "renamed": lambda count: die_after(CheckpointStore, "_point_at", count),
    "pruned": lambda count: die_after(CheckpointStore, "_prune", count),
}


if __name__ == "__main__":
    moment, count = os.environ[VARIABLE].split(":")
    MOMENTS[moment](int(count))
    sys.exit(main())
