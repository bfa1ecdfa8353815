"""`sdpg-megatron`, but sent a signal while it generates, before the third token of a generation.

$SDPG_TEST_STOP is ``generation:signal``, such as ``2:SIGTERM``. A generation that goes on until its end is an error.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sdpg_megatron.cli import main

VARIABLE = "SDPG_TEST_STOP"
TOKEN = 3


def stop_in(generation: int, number: int) -> None:
    from sdpg_megatron.rollout import hf

    generate, watch = hf.HFEngine.generate, hf._Watch.__call__
    generations = tokens = 0

    def generating(*arguments: Any, **options: Any) -> Any:
        nonlocal generations, tokens
        generations, tokens = generations + 1, 0
        found = generate(*arguments, **options)
        assert generations < generation, "the signal was not noticed"
        return found

    def watching(*arguments: Any) -> Any:
        nonlocal tokens
        tokens += 1
        if (generations, tokens) == (generation, TOKEN):
            os.kill(os.getpid(), number)
        return watch(*arguments)

    hf.HFEngine.generate, hf._Watch.__call__ = generating, watching  # type: ignore[method-assign]


if __name__ == "__main__":
    generation, name = os.environ[VARIABLE].split(":")
    stop_in(int(generation), signal.Signals[name])
    sys.exit(main())
