"""`sdpg-megatron`, but sent SIGTERM where $SDPG_TEST_STOP_AT says: ``read:0``, while it reads its prompts,
``prepare:1``, before the passes of the step after step 1, or ``update:1``, before its updates, when it is too late to
give it up."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sdpg_megatron.cli import main

VARIABLE = "SDPG_TEST_STOP_AT"


def stop_while_reading() -> None:
    from sdpg_megatron.train import inputs

    inner = inputs.load_prompts

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **options)

    inputs.load_prompts = signalled


def stop_at(method: str, step: int) -> None:
    from sdpg_megatron.train.update import PolicyUpdater

    inner = getattr(PolicyUpdater, method)

    def signalled(updater: Any, at: int, *arguments: Any) -> Any:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(updater, at, *arguments)

    setattr(PolicyUpdater, method, signalled)


if __name__ == "__main__":
    method, step = os.environ[VARIABLE].split(":")
    if method == "read":
        stop_while_reading()
    else:
        stop_at(method, int(step))
    sys.exit(main())
