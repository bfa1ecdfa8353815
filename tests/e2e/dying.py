"""`sdpg-megatron`, but killed (SIGKILL) at the moment that $SDPG_TEST_DEATH names, as ``moment:count``.

The moment is a place in the code, the count how often it has to be passed; "writer" is the forked process that writes
a checkpoint, which takes the trainer with it. A file that $SDPG_TEST_STRUCK names is there from the kill on.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdpg_megatron.cli import main

VARIABLE = "SDPG_TEST_DEATH"
STRUCK = "SDPG_TEST_STRUCK"


def kill(pid: int) -> None:
    if STRUCK in os.environ:
        Path(os.environ[STRUCK]).touch()
    os.kill(pid, signal.SIGKILL)


def die() -> None:
    kill(os.getpid())


def die_after(module: str, kind: str, name: str, count: int) -> None:
    """Once the method `name` of a class of this package has been called `count` times."""
    owner = getattr(importlib.import_module(f"sdpg_megatron.{module}"), kind)
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
    from sdpg_megatron.checkpoint import writing

    trainer, inner = os.getpid(), writing.fsync_and_hash
    calls = 0

    def killing(path: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            path.write_bytes(path.read_bytes()[:1000])
            kill(trainer)
            die()
        return inner(path)

    writing.fsync_and_hash = killing


MOMENTS: dict[str, Callable[[int], None]] = {
    "update": lambda count: die_after("mcore.policy_trainer", "PolicyTrainer", "update", count),
    "reported": lambda count: die_after("observe.writers", "MultiWriter", "write", count),
    "begun": lambda count: die_after("train.loop", "Trainer", "_save", count),
    "writer": die_while_writing,
    "manifest": lambda count: die_after("checkpoint.state", "RunState", "write", count),
    "renamed": lambda count: die_after("checkpoint.store", "CheckpointStore", "_point_at", count),
    "pruned": lambda count: die_after("checkpoint.store", "CheckpointStore", "_prune", count),
}


if __name__ == "__main__":
    moment, count = os.environ[VARIABLE].split(":")
    MOMENTS[moment](int(count))
    sys.exit(main())
