"""Publish weights to running servers in one session; a server that misses any part leaves rotation.

    pause  ->  version "unfinished"  ->  begin  ->  bucket, bucket, ...  ->  end  ->  flush cache  ->  version
           ->  resume  ->  the server confirms the version

A server that fails drops out; the others continue. While a server's weights may be mixed, it reports a version that no
request accepts, so no sample of mixed weights is used, whatever fails.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sdpg_megatron.errors import ServerError
from sdpg_megatron.rollout.sglang.client import Client, RankChecksums
from sdpg_megatron.rollout.sglang.event_loop import LoopThread
from sdpg_megatron.rollout.transports.base import Failures, Send, Transport
from sdpg_megatron.weights import Bucket, WeightStream
from sdpg_megatron.weights.bucket import StreamCheck, listed

UNFINISHED = "unfinished"
"""Prefix of a server's version while its weights may be mixed."""
FLUSH_SECONDS = 10.0
"""Time for a paused server to become idle."""

Prepare = Callable[[Client], Awaitable[None]]
Step = Callable[[Client], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """Result of a session."""

    version: str
    served: Sequence[Client]
    """Servers that have the weights and confirmed the version."""
    failures: Failures
    """The other servers. Those that answer were resumed, with an unfinished version."""
    bytes: int
    seconds: Mapping[str, float]
    """By phase: "control" before and after the buckets, "gather" making them, "convert" packing them, "send" sending
    and loading them, "wait" the part of "send" that overlaps with nothing."""


class Publisher:
    """Publishes streams of weights to servers, one session at a time."""

    def __init__(self, transport: Transport, shapes: Mapping[str, Sequence[int]], thread: LoopThread) -> None:
        """
        Args:
            transport: sends the buckets.
            shapes: shapes of all tensors of a stream.
            thread: event loop of the clients.
        """
        self._transport, self._shapes, self._thread = transport, shapes, thread

    def publish(
        self,
        clients: Sequence[Client],
        version: str,
        buckets: Iterable[Bucket],
        *,
        prepare: Prepare | None = None,
        verify: bool = False,
    ) -> PublishReport:
        """Publish a stream to these servers. A bucket is made while the previous one is sent.

        The stream is read to its end in the calling thread, whatever fails, as its source may be collective. Afterwards
        no server that answers is paused or in a session of updates.

        Args:
            clients: may be empty; the stream is then read and checked only.
            version: the servers' name of the weights.
            prepare: awaited for each server when its weights are in place, before it takes requests again.
            verify: the servers have these weights already. Each overwrites them with random values first, and must end
                with equal checksums; otherwise it fails with `WeightsChangedError`.

        Raises:
            WeightError: a tensor of the stream is unknown, misshapen, duplicate, or missing. No server serves it.
            RolloutError: this machine lacks resources for sending.
        """
        session = _Session(self._transport, clients, version, prepare, verify)
        if isinstance(buckets, WeightStream):
            buckets.allocate = self._transport.allocate
        stream = _CheckedStream(buckets, self._shapes, session.clock)
        try:
            self._thread.run(session.open())
            self._send_all(session, stream)
            stream.check.finish(f"publish of version {version}")
            self._thread.run(session.finish())
        except Exception:
            for _ in stream:
                pass
            raise
        finally:
            self._thread.run(session.close())
        return session.report(stream.bytes)

    def close(self) -> None:
        """Free the resources that are kept between sessions."""
        self._thread.run(self._transport.dispose())

    def _send_all(self, session: _Session, stream: _CheckedStream) -> None:
        """Send all buckets, holding at most two: the one being sent and the one being made."""
        sending: Future[None] | None = None
        try:
            while (bucket := next(stream, None)) is not None:
                _wait(sending, session.clock)
                sending = None
                if bucket and session.live:
                    with session.clock.phase("convert"):
                        send = self._transport.pack(bucket)
                    sending = self._thread.submit(session.send(send))
                    del send
                del bucket
            _wait(sending, session.clock)
        except Exception:
            if sending is not None:
                sending.exception()  # wait: the session must not end before it
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
    """The servers' side of a publish; runs in the event loop."""

    def __init__(
        self, transport: Transport, clients: Sequence[Client], version: str, prepare: Prepare | None, verify: bool
    ) -> None:
        self.clock = _Clock()
        self.live = list(clients)
        self._transport, self._version, self._prepare = transport, version, prepare
        self._verify = verify
        self._checksums: dict[Client, Sequence[RankChecksums]] = {}
        self._failures: dict[Client, ServerError] = {}
        self._paused: set[Client] = set()
        self._begun: set[Client] = set()

    async def open(self) -> None:
        with self.clock.phase("control"):
            await self._each(self._start)
            self._drop(await self._transport.open(tuple(self.live)))

    async def send(self, send: Send) -> None:
        with self.clock.phase("send"):
            self._drop(await send())

    async def finish(self) -> None:
        with self.clock.phase("send"):
            self._drop(await self._transport.finish())
        with self.clock.phase("control"):
            await self._each(self._serve)

    async def close(self) -> None:
        """Close the transport, and resume servers that are still paused after a failure."""
        try:
            await self._transport.close()
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
        if self._verify:
            self._checksums[client] = await client.checksums()
            await client.randomize_weights()
        # SGLang refuses a second session; a publisher that was killed may have left one open.
        if not self._transport.in_session:
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
        if self._verify:
            check_unchanged(client.url, self._checksums[client], await client.checksums())
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
        """Run a step on all live servers; those that fail drop out."""
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


class WeightsChangedError(ServerError):
    """A server's weights differ after the same version was published again."""


def check_unchanged(url: str, before: Sequence[RankChecksums], after: Sequence[RankChecksums]) -> None:
    """Compare the checksums of a server's ranks before and after a publish; replicas may answer in any order.

    Raises:
        WeightsChangedError: they differ; names parameters, under the server's names, and tensor-parallel ranks.
        ServerError: no rank answered.
    """
    first, second = (
        Counter((name, rank.tensor_rank, value) for rank in ranks for name, value in rank.by_name.items())
        for ranks in (before, after)
    )
    if not first or not second:
        raise ServerError(url, "/weights_checker", "no checksums")
    if changed := dict.fromkeys([*(first - second), *(second - first)]):
        names = list(dict.fromkeys(name for name, _, _ in changed))
        ranks = sorted({rank for _, rank, _ in changed})
        found = (
            f"{len(names)} of {len({name for name, _, _ in first})} parameters are not the same after the version was "
            f"published again, on tensor-parallel ranks {ranks}: {listed(names)}. Fix: see the server's log; where it "
            "persists, choose another rollout.sglang.transport, or set rollout.sglang.verify_every to 0"
        )
        raise WeightsChangedError(url, "", found)


class _CheckedStream(Iterator[Bucket]):
    """Buckets of a weight stream. After a fault in the stream, the remaining buckets are read and come out empty."""

    def __init__(self, buckets: Iterable[Bucket], shapes: Mapping[str, Sequence[int]], clock: _Clock) -> None:
        self.bytes = 0
        self.check = StreamCheck(shapes)
        self._source, self._clock = iter(buckets), clock

    def __next__(self) -> Bucket:
        with self._clock.phase("gather"):
            bucket = next(self._source)
        for spec in bucket.specs:
            self.check.accept(spec.name, spec.shape)
        if self.check.faults:
            # The caller must still wait for the previous bucket: the next one may be made in its memory.
            return Bucket(())
        self.bytes += bucket.memory.nbytes
        return bucket


class _Clock:
    """Seconds by phase. Only one thread at a time may be in a phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("control", "gather", "convert", "send", "wait"), 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
