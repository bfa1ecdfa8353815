"""Small things that asyncio leaves to its users."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from sdpg_megatron.rollout.base import Abandoned, Stop

T = TypeVar("T")

STOP_POLL = 0.25
"""Seconds between two questions whether to stop."""


class Threads:
    """Runs what blocks in threads. A thread cannot be cancelled: it goes on where its caller is, until `join`."""

    def __init__(self) -> None:
        self._running: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        future = asyncio.ensure_future(asyncio.to_thread(work))
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return await asyncio.shield(future)

    async def join(self) -> None:
        await asyncio.gather(*self._running, return_exceptions=True)


async def together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first error is raised and ends the others, which are over when this returns."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless(stop: Stop, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; where `stop` says so meanwhile, it is cancelled, and over when this returns.

    Raises:
        Abandoned: it was cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if stop():
                raise Abandoned
            await asyncio.wait({task}, timeout=STOP_POLL)
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def nap(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event for so long at most; whether it came, which clears it."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True
