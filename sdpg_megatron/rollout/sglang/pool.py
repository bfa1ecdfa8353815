"""The servers of a run: which of them are well and have the current weights, and which one gets the next request.

Every server has a keeper, a task that waits until the server answers, watches it, and brings it back when it is lost.
Health is looked at only while responses are generated: SGLang answers such a look by generating a token, which a server
that is paused for new weights, or has given its memory back, must not do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
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
"""Seconds between looks at what costs nothing: whether a process is there, whether a server answers yet."""


class Pool:
    """Lives in one event loop; none of its methods may be called from another thread."""

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
            publishes: whether this pool's owner publishes weights. Otherwise a server becomes READY when it says that
                it has the current version.
            check: raises RolloutError where a server is not what the run needs; called whenever one has come up.
        """
        self.handles = tuple(handles)
        self.version: str | None = None
        """The current version on the wire; None before the first publish, and while one is under way."""
        self._config = config
        self._publishes = publishes
        self._check = check
        self._restarts_left = config.restarts
        self._keepers: list[asyncio.Task[None]] = []
        self._threads = Threads()
        self._changed = asyncio.Event()
        self._generating = asyncio.Event()
        self._may_start = asyncio.Event()
        self._may_start.set()

    # --- life

    async def start(self) -> None:
        """Start the servers that are this run's own, and wait until all answer.

        Raises:
            RolloutError: one ends, is not what was wanted, or does not answer within `start_timeout`.
        """
        own = [handle.process for handle in self.handles if handle.process is not None]
        await asyncio.gather(*(self._threads.run(process.start) for process in own))
        await together(self._come_up(handle) for handle in self.handles)
        self._keepers = [asyncio.create_task(self._keep(handle)) for handle in self.handles]
        for monitor in self._keepers:
            monitor.add_done_callback(lambda _: self._pulse())

    async def close(self) -> None:
        """Stop the servers that are this run's own; leave the others as they are."""
        for monitor in self._keepers:
            monitor.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._threads.join()  # one that starts a server must be done before that server is stopped
        own = [handle.process for handle in self.handles if handle.process is not None]
        await asyncio.gather(*(self._threads.run(process.stop) for process in own))
        await asyncio.gather(*(handle.client.close() for handle in self.handles))

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While entered, health is looked at, and servers that others started are asked whether they are back."""
        self._generating.set()
        for handle in self.handles:
            handle.wake.set()
        try:
            yield
        finally:
            self._generating.clear()

    def hold_starts(self, hold: bool) -> None:
        """Start no server anew while the trainer has the memory that it would take."""
        if hold:
            self._may_start.clear()
        else:
            self._may_start.set()

    async def settled(self) -> None:
        """Wait until no server is on its way up."""
        while any(handle.state is ServerState.STARTING for handle in self.handles):
            self._raise_faults()
            await self._changed.wait()

    async def ended(self) -> None:
        """Wait until lost servers that are this run's own have ended, and hold no memory."""
        while any(m.state is ServerState.LOST and m.process is not None and not m.ended for m in self.handles):
            self._raise_faults()
            await asyncio.sleep(POLL)

    # --- weights

    def targets(self) -> list[ServerHandle]:
        """Servers to publish to."""
        return [handle for handle in self.handles if handle.answers]

    def ready(self) -> list[ServerHandle]:
        """Servers with the current weights."""
        return [handle for handle in self.handles if handle.state is ServerState.READY]

    def expect(self, version: str | None) -> None:
        """From now on no server is READY, until it is admitted with this version."""
        self.version = version
        for handle in self.handles:
            if handle.state is ServerState.READY:
                self._move(handle, ServerState.WAITING)

    def admit(self, handle: ServerHandle, version: str) -> None:
        """The server has a version of the weights; where that is the current one, it may serve."""
        if handle.state is ServerState.WAITING and version == self.version:
            handle.suspect = False
            self._move(handle, ServerState.READY)

    def outdated(self, handle: ServerHandle) -> None:
        """The server does not have the current weights."""
        if handle.state is ServerState.READY:
            logger.warning("%s has other weights than the current ones", handle.url)
            self._move(handle, ServerState.WAITING)

    async def review(self) -> None:
        """Ask all servers that should have the current weights whether they do."""
        await asyncio.gather(*(self._review(handle) for handle in self.ready()))

    async def _review(self, handle: ServerHandle) -> None:
        try:
            if await handle.client.weight_version() != self.version:
                self.outdated(handle)
        except ServerError as error:
            self.report(handle, error)

    async def refresh(self) -> None:
        """Admit the servers that say they have the current version, where another process publishes."""
        if not self._publishes:
            await asyncio.gather(
                *(self._inquire(handle) for handle in self.handles if handle.state is ServerState.WAITING)
            )

    async def _inquire(self, handle: ServerHandle) -> None:
        try:
            self.admit(handle, await handle.client.weight_version())
        except ServerError as error:
            self.report(handle, error)

    async def reachable(self) -> list[ServerHandle]:
        """`targets`; where there is none, but some server may come back, as soon as there is one.

        Raises:
            RolloutError: none came within `start_timeout`.
        """
        deadline = asyncio.get_running_loop().time() + self._config.start_timeout
        while not self.targets() and not all(handle.given_up for handle in self.handles):
            self._raise_faults()
            await self._change(deadline)
        return self.targets()

    # --- requests

    async def acquire(self) -> ServerHandle:
        """The least loaded server that may take one more group; the caller gives it back with `release`.

        Raises:
            WeightsWanted: none has the current weights, and some are there to take them.
            RolloutError: none is there, and none came within `start_timeout`.
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
        """Await a request that one of these servers has; when any of them is lost, the request is cancelled at once.

        Raises:
            ServerError: the request's own, or a retryable one where a server was lost.
        """
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
        """A request failed. The server gets no other before it has shown that it is well."""
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
        """Give a server up: its running requests end now, and its keeper brings it back."""
        if not handle.answers:
            return
        logger.warning("%s is lost: %s", handle.url, reason)
        self._lose(handle, reason)
        for task in handle.requests:
            task.cancel()

    def describe(self) -> str:
        """Each server's state, with why it was lost."""
        return "\n".join(
            f"{m.url}: {m.state.value} {m.reason if m.state is ServerState.LOST else ''}" for m in self.handles
        )

    # --- keepers

    async def _keep(self, handle: ServerHandle) -> None:
        while not handle.given_up:
            if handle.state is ServerState.LOST:
                await self._bring_back(handle)
            else:
                await self._watch(handle)

    async def _watch(self, handle: ServerHandle) -> None:
        """Look after a server until it is lost."""
        now = asyncio.get_running_loop().time
        misses, due = 0, now() + self._config.health_interval
        while handle.answers:
            woken = await nap(handle.wake, POLL)
            if handle.ended:
                self.mark_lost(handle, "its process ended")
            elif not self._generating.is_set():
                misses, due = 0, now() + self._config.health_interval
            elif now() >= due or (woken and handle.suspect):
                misses = 0 if await self._look(handle) else misses + 1
                if misses >= self._config.health_misses:
                    self.mark_lost(handle, f"no answer to {misses} looks at its health")
                due = now() + self._config.health_interval

    async def _look(self, handle: ServerHandle) -> bool:
        """Whether a server is well, which ends all doubt about it."""
        well = await handle.client.alive()
        if not self._generating.is_set():
            return True
        if well:
            handle.suspect = False
            self._pulse()
            if handle.state is ServerState.WAITING and not self._publishes:
                await self._inquire(handle)
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
        await self._threads.run(lambda: process.stop(grace=0))  # dead or stuck: there is nothing to wait for
        if not self._restarts_left:
            handle.given_up = True
            raise RolloutError(f"{handle.reason}; no restarts are left (rollout.sglang.restarts)\n{handle.log_tail()}")
        await self._may_start.wait()
        self._restarts_left -= 1
        self._move(handle, ServerState.STARTING)
        await self._threads.run(process.start)

    async def _come_up(self, handle: ServerHandle) -> None:
        """Wait until a server answers and is what the run needs; it is WAITING then, or READY.

        Raises:
            RolloutError: it ended, is something else, or did not answer within `start_timeout`.
        """
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
            self.admit(handle, version)  # before anyone sees that it waits

    async def _answers(self, handle: ServerHandle) -> bool:
        """Whether a server is there and well. Raises `RolloutError` where it is the wrong one."""
        if self._keepers and not self._publishes:
            await self._generating.wait()  # in between, the publisher may have paused it, or have its memory
        try:
            await self._check(handle.client)
            if self._publishes and handle.process is None:
                # A run that was killed while it published has left it paused.
                await handle.client.resume()
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
        """A keeper ends with an error only where this code is at fault; nobody else would ever hear of it."""
        for monitor in self._keepers:
            if monitor.done() and not monitor.cancelled() and (error := monitor.exception()):
                raise error

    def _pulse(self) -> None:
        """Wake everyone who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, deadline: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
        except TimeoutError:
            seconds = self._config.start_timeout
            raise RolloutError(f"no server came back within {seconds:g} s:\n{self.describe()}") from None
