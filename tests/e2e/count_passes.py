"""Runs the configurations that its arguments name, and prints the forward-only passes of each as a line of JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PASSES = {"teacher": "teacher_hidden", "logprobs": "logprobs"}


def counted(real: Callable[..., Any], counts: Counter[str], name: str) -> Callable[..., Any]:
    """`real`, whose calls count where they run a model."""

    def call(*args: Any) -> Any:
        before = counts["schedules"]
        found = real(*args)
        counts[name] += counts["schedules"] > before
        return found

    return call


def main(paths: list[Path]) -> None:
    from sdpg_megatron.config.load import load_config
    from sdpg_megatron.mcore import passes
    from sdpg_megatron.train.loop import RunOutcome, train

    counts: Counter[str] = Counter()
    for name, function in PASSES.items():
        setattr(passes, function, counted(getattr(passes, function), counts, name))
    run = passes.run_schedule

    def run_schedule(*args: Any, **options: Any) -> list[Any]:
        counts["schedules"] += 1
        return run(*args, **options)

    passes.run_schedule = run_schedule
    for path in paths:
        counts.clear()
        assert train(load_config(path)) is RunOutcome.FINISHED
        print(json.dumps({name: counts[name] for name in PASSES}))  # noqa: T201


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
