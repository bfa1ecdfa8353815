"""New weights into running servers: one session over all of them, at whose end each has all the weights or is not used.

    pause  ->  version "unfinished"  ->  begin  ->  bucket, bucket, ...  ->  end  ->  flush cache  ->  version
           ->  resume  ->  the server itself says the version

A server that fails takes no further part; the others go on. From the moment when a server may hold weights of two
versions until it has all of the new ones it goes by a version that nobody asks for, so that no sample of such weights
can pass for one of a real version, whatever fails in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sdpg_megatron.errors import ServerError, WeightError, did_you_mean
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.event_loop import LoopThread
from sdpg_megatron.rollout.transports.base import Failures, Send, Transport
from sdpg_megatron.weights import Bucket, WeightStream

UNFINISHED = "unfinished"
"""What a server's version begins with while its weights are not of one version."""
FLUSH_SECONDS = 10.0
"""In which a paused server has finished what it was doing."""
LISTED = 8
"""Weights that one error message names."""

Prepare = Callable[[Client], Awaitable[None]]
Step = Callable[[Client], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """What came of a session."""

    version: str
    served: Sequence[Client]
    """Servers that have the weights, and say so."""
    failures: Failures
    """The others. Those that answer were resumed, with weights that belong to no version."""
    bytes: int
    seconds: Mapping[str, float]
    """By phase: "control" before and after the buckets, "gather" making them, "convert" packing them, "send" their way
    into the servers, "wait" the part of the sending in which nothing else was done."""


class Publisher:
    """Publishes streams of weights to servers, one session at a time."""

    def __init__(self, transport: Transport, shapes: Mapping[str, Sequence[int]], thread: LoopThread) -> None:
        """
        Args:
            transport: the way that buckets go.
            shapes: of every tensor that a stream must have.
            thread: where the clients live.
        """
        self._sink, self._shapes, self._thread = transport, shapes, thread

    def publish(
        self, clients: Sequence[Client], version: str, buckets: Iterable[Bucket], *, prepare: Prepare | None = None
    ) -> PublishReport:
        """Give all these servers the stream's weights. A bucket is made while the one before it is sent.

        The stream is read to its end, in the calling thread, whatever fails: its source may be collective. Afterwards
        no server that answers is paused or in a session of updates.

        Args:
            clients: may be none: then the stream is read and checked alone.
            version: as servers are to call the weights.
            prepare: awaited for each server when its weights are in place, before it takes requests again.

        Raises:
            WeightError: a tensor of the stream is unknown, of another shape, there twice, or missing. Nobody serves it.
            RolloutError: this machine lacks what sending needs.
        """
        session = _Session(self._sink, clients, version, prepare)
        if isinstance(buckets, WeightStream):
            buckets.room = self._sink.room
        stream = _Checked(buckets, self._shapes, session.clock)
        try:
            self._thread.run(session.open())
            self._send_all(session, stream)
            stream.check_complete(version)
            self._thread.run(session.finish())
        except Exception:
            for _ in stream:
                pass
            raise
        finally:
            self._thread.run(session.close())
        return session.report(stream.bytes)

    def close(self) -> None:
        """Give back what is kept from session to session."""
        self._thread.run(self._sink.dispose())

    def _send_all(self, session: _Session, stream: _Checked) -> None:
        """At most two buckets are held: the one being sent, in the transport's form, and the one being made."""
        sending: Future[None] | None = None
        try:
            while (bucket := next(stream, None)) is not None:
                _wait(sending, session.clock)
                sending = None
                if bucket and session.live:
                    with session.clock.phase("convert"):
                        send = self._sink.pack(bucket)
                    sending = self._thread.submit(session.send(send))
                    del send
                del bucket
            _wait(sending, session.clock)
        except Exception:
            if sending is not None:
                sending.exception()  # only to wait: the session must not end under it
            raise
        except BaseException:
            if sending is not None:
                sending.cancel()
            raise


def _wait(sending: Future[None] | None, clock: _Clock) -> None:
    if sending is not None:
        with clock.phase("wait"):
            sending.result()


class _Session:
    """What happens to the servers; in the event loop."""

    def __init__(self, transport: Transport, clients: Sequence[Client], version: str, prepare: Prepare | None) -> None:
        self.clock = _Clock()
        self.live = list(clients)
        self._sink, self._version, self._prepare = transport, version, prepare
        self._failures: dict[Client, ServerError] = {}
        self._paused: set[Client] = set()
        self._begun: set[Client] = set()

    async def open(self) -> None:
        with self.clock.phase("control"):
            await self._each(self._start)
            self._drop(await self._sink.open(tuple(self.live)))

    async def send(self, send: Send) -> None:
        with self.clock.phase("send"):
            self._drop(await send())

    async def finish(self) -> None:
        with self.clock.phase("send"):
            self._drop(await self._sink.finish())
        with self.clock.phase("control"):
            await self._each(self._serve)

    async def close(self) -> None:
        """Let go of everything. A server that is still paused failed, or the session did: it may go on."""
        try:
            await self._sink.close()
        finally:
            await asyncio.gather(*(self._restore(client) for client in self._paused))

    def report(self, count: int) -> PublishReport:
        return PublishReport(
            version=self._version,
            served=tuple(self.live),
            failures=dict(self._failures),
            bytes=count,
            seconds=dict(self.clock.seconds),
        )

    async def _start(self, client: Client) -> None:
        self._paused.add(client)
        await client.pause()
        await client.set_version(f"{UNFINISHED}-{self._version}")
        # A publisher that was killed may have left its session open; a second one is refused.
        if not self._sink.in_session:
            await _tolerate_refusal(client.end_update())
            return
        self._begun.add(client)
        try:
            await client.begin_update()
        except ServerError as error:
            if error.retryable:
                raise
            await client.end_update()
            await client.begin_update()

    async def _serve(self, client: Client) -> None:
        if client in self._begun:
            await client.end_update()
            self._begun.discard(client)
        if self._prepare is not None:
            await self._prepare(client)
        await client.flush_cache(FLUSH_SECONDS)
        await client.set_version(self._version)
        await client.resume()
        self._paused.discard(client)
        if (found := await client.weight_version()) != self._version:
            raise ServerError(client.url, "/model_info", f"weight version {found!r}, expected {self._version!r}")

    async def _restore(self, client: Client) -> None:
        with suppress(ServerError, TimeoutError):
            async with asyncio.timeout(client.timeouts.control):
                if client in self._begun:
                    with suppress(ServerError):
                        await client.end_update()
                await client.resume()

    async def _each(self, step: Step) -> None:
        """Take all live servers through a step; those that fail drop out."""
        clients = tuple(self.live)
        found = await asyncio.gather(*(step(client) for client in clients), return_exceptions=True)
        for client, error in zip(clients, found, strict=True):
            if isinstance(error, ServerError):
                self._drop({client: error})
            elif error is not None:
                raise error

    def _drop(self, failures: Failures) -> None:
        self._failures.update(failures)
        self.live = [client for client in self.live if client not in failures]


async def _tolerate_refusal(call: Coroutine[Any, Any, None]) -> None:
    try:
        await call
    except ServerError as error:
        if error.retryable:
            raise


class _Checked(Iterator[Bucket]):
    """A stream's buckets, as long as they are what the model needs; what follows a fault is read, and left out."""

    def __init__(self, buckets: Iterable[Bucket], shapes: Mapping[str, Sequence[int]], clock: _Clock) -> None:
        self.bytes = 0
        self._source = iter(buckets)
        self._shapes, self._clock = shapes, clock
        self._missing = dict.fromkeys(shapes)
        self._faults: list[str] = []

    def __next__(self) -> Bucket:
        """An empty one in place of what is left out: the one after it may need the memory of one still on its way."""
        with self._clock.phase("gather"):
            bucket = next(self._source)
        self._faults += filter(None, (self._fault(name, tensor.shape) for name, tensor in bucket))
        if self._faults:
            return ()
        self.bytes += sum(tensor.nbytes for _, tensor in bucket)
        return bucket

    def check_complete(self, version: str) -> None:
        """Raises `WeightError` unless every tensor came once, in its shape, and nothing else did."""
        faults = self._faults + [f"{name} is missing" for name in self._missing]
        if faults:
            more = f", and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
            raise WeightError(f"publish of version {version}: {', '.join(faults[:LISTED])}{more}")

    def _fault(self, name: str, shape: Sequence[int]) -> str | None:
        expected = self._shapes.get(name)
        if expected is None:
            return " ".join(filter(None, (f"{name} is unknown;", did_you_mean(name, self._shapes))))
        if name not in self._missing:
            return f"{name} came twice"
        del self._missing[name]
        if tuple(shape) != tuple(expected):
            return f"{name} is {tuple(shape)}, expected {tuple(expected)}"
        return None


class _Clock:
    """Seconds by phase. No two threads may be in the same phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("control", "gather", "convert", "send", "wait"), 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
