"""The thread that runs all communication with servers, and asyncio helpers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from sdpg_megatron.rollout.base import Abandoned, Stop

T = TypeVar("T")

LEAVE = 5.0
"""Seconds for cancelled work to clean up when the thread ends."""
STOP_POLL = 0.25
"""Seconds between calls of a `Stop`."""


class LoopThread:
    """An asyncio event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the loop and wait. If the caller is interrupted, the work is cancelled."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run in the loop without waiting."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel all work and end the thread."""
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=LEAVE)


class Threads:
    """Runs blocking calls in threads. A thread cannot be cancelled: it continues after its caller, until `join`."""

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
    """Run all. The first error cancels the others, waits for them, and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless(stop: Stop, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`. Once `stop` returns True, cancel it, wait for it, and raise `Abandoned`."""
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
    """Wait for an event for at most `seconds`. True if it was set, which clears it."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True
