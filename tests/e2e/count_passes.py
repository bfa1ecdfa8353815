"""Runs the configurations that its arguments name, and prints the forward-only passes of each as a line of JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PASSES = {"teacher": "teacher_hidden", "logprobs": "logprobs"}


def counted(real: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        count()
        return real(*args)

    return call


def main(paths: list[Path]) -> None:
    from sdpg_megatron.mcore import passes
    from sdpg_megatron.settings import load
    from sdpg_megatron.train.loop import Outcome, train

    counts: Counter[str] = Counter()
    for name, function in PASSES.items():
        setattr(passes, function, counted(getattr(passes, function), lambda name=name: counts.update([name])))
    for path in paths:
        counts.clear()
        assert train(load(path)) is Outcome.FINISHED
        print(json.dumps({name: counts[name] for name in PASSES}))  # noqa: T201


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
