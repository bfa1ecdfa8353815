"""Run passes before a host's training pass, by wrapping its pipeline schedule.

A teacher pass inside a forward step cannot work with pipeline stages: the next stage already waits for this
micro-batch. Hosts fetch their schedule by ``get_forward_backward_func()`` and call it by keyword, so a wrapper can run
the same schedule forward-only first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

Schedule = Callable[..., list[Any]]
"""Megatron's schedule: ``schedule(forward_step_func=..., data_iterator=..., model=..., num_microbatches=..., ...)``."""


def prepared_schedule(
    schedule: Schedule,
    prepare: Callable[[list[Any], list[Any]], AbstractContextManager[Sequence[Any]]],
    report: Callable[[list[Any]], list[Any]] = lambda results: results,
) -> Schedule:
    """Wrap a schedule: `prepare` receives the step's micro-batches before its training pass.

    Forward-only calls, such as those of a host's evaluation, are passed through.

    Args:
        schedule: result of Megatron's ``get_forward_backward_func()``.
        prepare: ``prepare(chunks, batches)``, a context in which the training pass runs over the micro-batches that it
            yields, as many as it was given. All ranks call it together, so it may run further passes.
        report: maps the result of the training pass, on every rank, to the one that the host receives.
    """

    @functools.wraps(schedule)
    def run(*, data_iterator: Any, model: Any, num_microbatches: int, **options: Any) -> list[Any]:
        if options.get("forward_only"):
            return schedule(data_iterator=data_iterator, model=model, num_microbatches=num_microbatches, **options)
        chunks = list(model) if isinstance(model, list | tuple) else [model]
        iterators = data_iterator if isinstance(data_iterator, list | tuple) else [data_iterator]
        # Every chunk has an iterator over the same micro-batches; all are advanced, as the schedule would.
        taken = [[next(iterator) for _ in range(num_microbatches)] for iterator in iterators]
        with prepare(chunks, taken[0]) as prepared:
            assert len(prepared) == num_microbatches, f"{len(prepared)} micro-batches instead of {num_microbatches}"
            fed = [iter(prepared) for _ in chunks]
            results = schedule(
                data_iterator=fed if isinstance(model, list | tuple) else fed[0],
                model=model,
                num_microbatches=num_microbatches,
                **options,
            )
        return report(results)

    return run
