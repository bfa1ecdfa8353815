"""`sdpg-megatron`, but the last rank is killed half-way through the weights of the second publish."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sdpg_megatron.cli import main
from sdpg_megatron.weights import WeightStream


def die_in_stream(number: int) -> None:
    fetch = WeightStream._fetch
    streams: list[WeightStream] = []
    done = 0

    def counted_fetch(stream: WeightStream, *arguments: Any) -> None:
        nonlocal done
        if stream not in streams:
            streams.append(stream)
            done = 0
        done += 1
        if len(streams) == number and done > len(stream._params) // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        fetch(stream, *arguments)

    WeightStream._fetch = counted_fetch  # type: ignore[method-assign]


if __name__ == "__main__":
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        die_in_stream(2)
    sys.exit(main())
