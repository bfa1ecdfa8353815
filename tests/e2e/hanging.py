"""`sdpg-megatron`, but one rank does not come along: $SDPG_TEST_HANG is ``how:rank:place``.

How: "stop" (SIGSTOP), "sleep", "die" (SIGKILL), "hold" (it keeps Python's lock); where: "update", in the second
optimizer step, "eval", in the first evaluation, or "start", where it reads its model.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from sdpg_megatron.cli import main

VARIABLE = "SDPG_TEST_HANG"
LONG = 600
SETTLE = 3.0
"""Seconds in which it still says where it is."""


def hang_here() -> None:
    """What a stack shows."""
    time.sleep(LONG)


WAYS: dict[str, Callable[[], Any]] = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": hang_here,
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hold": lambda: ctypes.PyDLL(None).sleep(LONG),
}


def hang(how: str, place: str) -> None:
    from sdpg_megatron.mcore import policy_trainer
    from sdpg_megatron.train import inputs, rollouts

    owner, name, count = {
        "update": (policy_trainer.passes, "run_schedule", 2),
        "eval": (rollouts.Rollouts, "run", 1),
        "start": (inputs, "load_model_inputs", 1),
    }[place]
    inner, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += not options.get("forward_only")
        if calls == count:
            time.sleep(SETTLE)
            WAYS[how]()
        return inner(*arguments, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    how, rank, place = os.environ[VARIABLE].split(":")
    if os.environ.get("RANK", "0") == rank:
        hang(how, place)
    sys.exit(main())
