"""The servers of a run: their health, weight versions and load.

A monitor task per server waits until the server answers, watches it, and restarts or awaits it when it is lost. Health
is checked only during generation: SGLang's health check generates a token, which a server that is paused for new
weights or has released its memory must not do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import aiohttp

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.errors import RolloutError, ServerError
from sdpg_megatron.rollout.base import WeightsWanted
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.event_loop import Threads, nap, together
from sdpg_megatron.rollout.sglang.server import ServerProcess
from sdpg_megatron.rollout.sglang.server_handle import ServerHandle, ServerState

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL = 0.25
"""Seconds between cheap checks: is a process alive, does a server answer yet."""


class Pool:
    """Belongs to one event loop; no method may be called from another thread."""

    def __init__(
        self,
        handles: Sequence[ServerHandle],
        config: SGLangConfig,
        *,
        publishes: bool,
        check: Callable[[Client], Awaitable[None]],
    ) -> None:
        """
        Args:
            publishes: True if the pool's owner publishes weights. Otherwise a server becomes READY when it reports the
                current version.
            check: raises RolloutError if a server does not fit the run; called whenever a server has come up.
        """
        self.handles = tuple(handles)
        self.version: str | None = None
        """Current version as servers name it; None before the first publish and during one."""
        self._config = config
        self._publishes = publishes
        self._check = check
        self._restarts_left = config.restarts
        self._monitors: list[asyncio.Task[None]] = []
        self._threads = Threads()
        self._changed = asyncio.Event()
        self._generating = asyncio.Event()
        self._may_start = asyncio.Event()
        self._may_start.set()

    # --- life

    async def start(self) -> None:
        """Start the run's own servers, and wait until all servers answer. Raises `RolloutError` if one ends, does not
        fit the run, or does not answer within `start_timeout`."""
        await self._each_process(lambda process: process.start())
        await together(self._come_up(handle) for handle in self.handles)
        self._monitors = [asyncio.create_task(self._keep(handle)) for handle in self.handles]
        for monitor in self._monitors:
            monitor.add_done_callback(lambda _: self._pulse())

    async def close(self) -> None:
        """Stop the run's own servers and disconnect from the others."""
        for monitor in self._monitors:
            monitor.cancel()
        await asyncio.gather(*self._monitors, return_exceptions=True)
        await self._threads.join()  # a start must be complete before its server is stopped
        await self._each_process(lambda process: process.stop())
        await asyncio.gather(*(handle.client.close() for handle in self.handles))

    async def _each_process(self, act: Callable[[ServerProcess], None]) -> None:
        own = [handle.process for handle in self.handles if handle.process is not None]
        await asyncio.gather(*(self._threads.run(partial(act, process)) for process in own))

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While entered, health is checked, and lost servers at `urls` are polled."""
        self._generating.set()
        for handle in self.handles:
            handle.wake.set()
        try:
            yield
        finally:
            self._generating.clear()

    def hold_starts(self, hold: bool) -> None:
        """Restart no server while the trainer uses its memory."""
        if hold:
            self._may_start.clear()
        else:
            self._may_start.set()

    async def settled(self) -> None:
        """Wait until no server is starting."""
        while any(handle.state is ServerState.STARTING for handle in self.handles):
            self._raise_faults()
            await self._changed.wait()

    async def ended(self) -> None:
        """Wait until lost servers of this run have ended and hold no memory."""
        while any(m.state is ServerState.LOST and m.process is not None and not m.ended for m in self.handles):
            self._raise_faults()
            await asyncio.sleep(POLL)

    # --- weights

    def targets(self) -> list[ServerHandle]:
        """Servers to publish to."""
        return [handle for handle in self.handles if handle.answers]

    def ready(self) -> list[ServerHandle]:
        """Servers with the current weights."""
        return self._in_state(ServerState.READY)

    def _in_state(self, state: ServerState) -> list[ServerHandle]:
        return [handle for handle in self.handles if handle.state is state]

    def expect(self, version: str | None) -> None:
        """Set the current version. Servers are READY again once admitted with it."""
        self.version = version
        for handle in self.ready():
            self._move(handle, ServerState.WAITING)

    def admit(self, handle: ServerHandle, version: str) -> None:
        """Make a waiting server READY if it has the current version."""
        if handle.state is ServerState.WAITING and version == self.version:
            handle.suspect = False
            self._move(handle, ServerState.READY)

    def outdated(self, handle: ServerHandle) -> None:
        """The server does not have the current weights."""
        if handle.state is ServerState.READY:
            logger.warning("%s has other weights than the current ones", handle.url)
            self._move(handle, ServerState.WAITING)

    async def review(self) -> None:
        """Ask all READY servers for their version."""
        await self._inquire(self.ready())

    async def refresh(self) -> None:
        """Admit the servers that report the current version, if another process publishes."""
        if not self._publishes:
            await self._inquire(self._in_state(ServerState.WAITING))

    async def _inquire(self, handles: Iterable[ServerHandle]) -> None:
        """Ask servers for their version, and update their state."""

        async def ask(handle: ServerHandle) -> None:
            try:
                version = await handle.client.weight_version()
            except ServerError as error:
                self.report(handle, error)
                return
            if version == self.version:
                self.admit(handle, version)
            else:
                self.outdated(handle)

        await asyncio.gather(*(ask(handle) for handle in handles))

    async def reachable(self) -> list[ServerHandle]:
        """Return `targets`; if there is none, wait for the first of the servers that may come back. Raises
        `RolloutError` if none comes within `start_timeout`."""
        deadline = asyncio.get_running_loop().time() + self._config.start_timeout
        while not self.targets() and not all(handle.given_up for handle in self.handles):
            self._raise_faults()
            await self._change(deadline)
        return self.targets()

    # --- requests

    async def acquire(self) -> ServerHandle:
        """Take the least loaded server that may get one more group; the caller returns it with `release`.

        Raises:
            WeightsWanted: no server has the current weights, and some can take them.
            RolloutError: no server is left, or none came back within `start_timeout`.
        """
        deadline: float | None = None
        while True:
            self._raise_faults()
            ready = self.ready()
            free = [handle for handle in ready if not handle.suspect and handle.running < self._config.concurrency]
            if free:
                handle = min(free, key=lambda candidate: candidate.running)
                handle.running += 1
                return handle
            if ready:
                deadline = None
            elif self.targets():
                raise WeightsWanted("no server has the current weights. Fix: publish them again", {})
            elif all(handle.given_up for handle in self.handles):
                raise RolloutError(f"no server is left:\n{self.describe()}")
            else:
                deadline = deadline or asyncio.get_running_loop().time() + self._config.start_timeout
            await self._change(deadline)

    def release(self, handle: ServerHandle) -> None:
        handle.running -= 1
        self._pulse()

    async def run(self, handles: Sequence[ServerHandle], work: Coroutine[Any, Any, T]) -> T:
        """Await a request to one of these servers; cancel it as soon as any of them is lost. Raises the request's
        `ServerError`, or a retryable one if a server was lost."""
        task = asyncio.ensure_future(work)
        for handle in handles:
            handle.requests.add(task)
        try:
            if not all(handle.answers for handle in handles):
                task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                lost = next((handle for handle in handles if not handle.answers), handles[0])
                raise ServerError(lost.url, "", f"lost ({lost.reason})", retryable=True)
            return task.result()
        finally:
            task.cancel()
            for handle in handles:
                handle.requests.discard(task)

    def report(self, handle: ServerHandle, error: ServerError) -> None:
        """Record a failed request. The server gets no other until it passes a health check."""
        if not handle.answers:
            return
        if handle.ended:
            self.mark_lost(handle, "its process ended")
        elif isinstance(error.__cause__, aiohttp.ClientConnectorError):
            self.mark_lost(handle, str(error))
        else:
            handle.suspect = True
            handle.wake.set()

    def mark_lost(self, handle: ServerHandle, reason: str) -> None:
        """Cancel a server's requests; its monitor brings it back."""
        if not handle.answers:
            return
        logger.warning("%s is lost: %s", handle.url, reason)
        self._lose(handle, reason)
        for task in handle.requests:
            task.cancel()

    def describe(self) -> str:
        """State of each server, with the reason of its loss."""
        return "\n".join(
            f"{m.url}: {m.state.value} {m.reason if m.state is ServerState.LOST else ''}" for m in self.handles
        )

    # --- monitors

    async def _keep(self, handle: ServerHandle) -> None:
        while not handle.given_up:
            await (self._bring_back(handle) if handle.state is ServerState.LOST else self._watch(handle))

    async def _watch(self, handle: ServerHandle) -> None:
        """Watch a server until it is lost."""
        now = asyncio.get_running_loop().time
        misses, due = 0, now() + self._config.health_interval
        while handle.answers:
            woken = await nap(handle.wake, POLL)
            if handle.ended:
                self.mark_lost(handle, "its process ended")
            elif not self._generating.is_set():
                misses, due = 0, now() + self._config.health_interval
            elif now() >= due or (woken and handle.suspect):
                misses = 0 if await self._healthy(handle) else misses + 1
                if misses >= self._config.health_misses:
                    self.mark_lost(handle, f"no answer to {misses} looks at its health")
                due = now() + self._config.health_interval

    async def _healthy(self, handle: ServerHandle) -> bool:
        """Check a server's health. A healthy server is no longer suspect."""
        well = await handle.client.alive()
        if not self._generating.is_set():
            return True
        if well:
            handle.suspect = False
            self._pulse()
            if handle.state is ServerState.WAITING and not self._publishes:
                await self._inquire([handle])
        return well

    async def _bring_back(self, handle: ServerHandle) -> None:
        try:
            if handle.process is not None:
                await self._restart(handle, handle.process)
            await self._come_up(handle)
            logger.warning("%s is back", handle.url)
        except RolloutError as error:
            self._lose(handle, str(error))
            if not handle.given_up:
                await asyncio.sleep(POLL)

    async def _restart(self, handle: ServerHandle, process: ServerProcess) -> None:
        await self._threads.run(lambda: process.stop(grace=0))  # it is dead or stuck
        if not self._restarts_left:
            handle.given_up = True
            raise RolloutError(f"{handle.reason}; no restarts are left (rollout.sglang.restarts)\n{handle.log_tail()}")
        await self._may_start.wait()
        self._restarts_left -= 1
        self._move(handle, ServerState.STARTING)
        await self._threads.run(process.start)

    async def _come_up(self, handle: ServerHandle) -> None:
        """Wait until a server answers and fits the run; it is WAITING or READY then. Raises `RolloutError` if it ends,
        does not fit, or does not answer within `start_timeout`."""
        seconds = self._config.start_timeout
        try:
            async with asyncio.timeout(seconds):
                while not await self._answers(handle):
                    if handle.ended:
                        raise RolloutError(f"{handle.url}: the server ended while it started\n{handle.log_tail()}")
                    await asyncio.sleep(POLL)
                version = None if self._publishes else await handle.client.weight_version()
        except TimeoutError:
            raise RolloutError(
                f"{handle.url}: no healthy server answered within {seconds:g} s. Fix: start it, or raise "
                f"rollout.sglang.start_timeout\n{handle.log_tail()}".rstrip()
            ) from None
        handle.suspect = False
        self._move(handle, ServerState.WAITING)
        if version is not None:
            self.admit(handle, version)  # before another task sees it WAITING

    async def _answers(self, handle: ServerHandle) -> bool:
        """True if a healthy server answers. Raises `RolloutError` if it does not fit the run."""
        if self._monitors and not self._publishes:
            await self._generating.wait()  # otherwise the publisher may have paused it, or use its memory
        try:
            await self._check(handle.client)
            if self._publishes and handle.process is None:
                await handle.client.resume()  # a run that was killed during a publish left it paused
        except ServerError as error:
            if not error.retryable:
                raise
            return False
        return await handle.client.alive()

    # --- changes

    def _lose(self, handle: ServerHandle, reason: str) -> None:
        handle.reason = reason
        handle.released = frozenset()
        self._move(handle, ServerState.LOST)

    def _move(self, handle: ServerHandle, state: ServerState) -> None:
        handle.state = state
        handle.wake.set()
        self._pulse()

    def _raise_faults(self) -> None:
        """Raise a monitor's error, which is always a bug of this module."""
        for monitor in self._monitors:
            if monitor.done() and not monitor.cancelled() and (error := monitor.exception()):
                raise error

    def _pulse(self) -> None:
        """Wake all tasks that wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, deadline: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
        except TimeoutError:
            seconds = self._config.start_timeout
            raise RolloutError(f"no server came back within {seconds:g} s:\n{self.describe()}") from None
