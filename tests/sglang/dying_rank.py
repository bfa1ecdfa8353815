"""`sdpg-megatron`, but the last rank is killed half-way through the weights of the second publish."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

from sdpg_megatron.cli import main

module = importlib.import_module("sdpg_megatron.weights.stream")  # the package gives that name to a function


def die_in_stream(number: int) -> None:
    plan, fetch = module._plan, module._fetch
    streams = left = 0

    def counted_plan(*arguments: Any) -> Any:
        nonlocal streams, left
        items = plan(*arguments)
        streams, left = streams + 1, len(items) // 2
        return items

    def counted_fetch(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if streams == number and left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fetch(*arguments)

    module._plan, module._fetch = counted_plan, counted_fetch


if __name__ == "__main__":
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        die_in_stream(2)
    sys.exit(main())
