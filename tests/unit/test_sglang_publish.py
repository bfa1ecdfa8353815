"""The publishing session, as far as it goes without a server; tests/sglang has the rest."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sdpg_megatron.errors import RolloutError, ServerError, WeightError
from sdpg_megatron.rollout.base import Bucket
from sdpg_megatron.rollout.sglang.client import RankChecksums, Timeouts
from sdpg_megatron.rollout.sglang.event_loop import LoopThread
from sdpg_megatron.rollout.sglang.publish import UNFINISHED, Publisher, WeightsChangedError, check_unchanged
from sdpg_megatron.rollout.transports import broadcast
from sdpg_megatron.rollout.transports.broadcast import AttemptResult, attempt

# Whose fault it was


class FakeGroup:
    name = "group"

    def __init__(self) -> None:
        self.destroyed = asyncio.Event()

    async def interrupt(self) -> None:
        pass

    def destroy(self) -> None:
        self.destroyed.set()

    async def wait_in_it(self) -> None:
        """As a rank does that waits for another's part."""
        await self.destroyed.wait()
        raise ServerError("url", "/receive", "status 400: connection closed")


class FakePeer:
    """A client that only leaves groups."""

    url = "http://peer"

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def leave_group(self, name: str) -> None:
        self.left.set()


async def fail(error: Exception, cause: Exception | None = None) -> None:
    raise error from cause


async def end(event: asyncio.Event, error: Exception) -> None:
    await event.wait()
    raise error


def judge(scene: Callable[[FakeGroup, FakePeer, FakePeer], tuple[Any, Any, Any]]) -> tuple[AttemptResult, Any, Any]:
    """`scene` gives the first peer's call, the second's, and this process's own part."""

    async def play() -> tuple[AttemptResult, Any, Any]:
        group, one, two = FakeGroup(), FakePeer(), FakePeer()
        first, second, own = scene(group, one, two)
        calls: dict[Any, Any] = {one: first, two: second}
        result = await attempt(group, calls, own, 0.5)  # type: ignore[arg-type]
        assert result.well or group.destroyed.is_set()
        return result, one, two

    return asyncio.run(play())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "GRACE", 0.1)
    monkeypatch.setattr(broadcast, "SETTLE", 0.3)


REFUSED = ServerError("http://peer", "/receive", "status 400: no session")
GONE = ServerError("http://peer", "/receive", "ServerDisconnectedError", retryable=True)


def test_all_well() -> None:
    result, *_ = judge(lambda group, one, two: (asyncio.sleep(0), asyncio.sleep(0.01), asyncio.sleep(0)))
    assert result.well


def test_a_server_that_is_gone_is_to_blame_and_one_that_waited_for_it_is_not(quick: None) -> None:
    result, one, two = judge(
        lambda group, one, two: (fail(GONE, OSError()), group.wait_in_it(), fail(RuntimeError("closed")))
    )
    assert dict(result.failed) == {one: GONE} and result.spoiled == {two}


def test_a_server_that_noticed_first_is_not_to_blame(quick: None) -> None:
    async def later() -> None:
        await asyncio.sleep(0.05)
        raise GONE from OSError()

    result, one, two = judge(lambda group, one, two: (fail(REFUSED), later(), fail(RuntimeError("closed"))))
    assert dict(result.failed) == {two: GONE} and result.spoiled == {one}


def test_a_server_that_refuses_is_told_to_leave_which_ends_the_broadcast(quick: None) -> None:
    result, one, two = judge(
        lambda group, one, two: (fail(REFUSED), group.wait_in_it(), end(one.left, RuntimeError("closed")))
    )
    assert dict(result.failed) == {one: REFUSED} and result.spoiled == {two}
    assert isinstance(result.own, RuntimeError) and not two.left.is_set()


def test_a_server_that_never_answers_is_to_blame(quick: None) -> None:
    result, one, two = judge(lambda group, one, two: (asyncio.sleep(60), group.wait_in_it(), asyncio.sleep(60)))
    assert list(result.failed) == [one] and result.spoiled == {two}


def test_nobody_is_to_blame_for_this_process(quick: None) -> None:
    result, *_ = judge(lambda group, one, two: (asyncio.sleep(0), asyncio.sleep(0), fail(RuntimeError("own"))))
    assert not result.well and not result.failed and not result.spoiled


# The session


class FakeClient:
    """Records what it is asked; `faults` are errors by call, each raised once."""

    def __init__(self, **faults: ServerError) -> None:
        self.url = "http://fake"
        self.timeouts = Timeouts(control=2.0)
        self.calls: list[str] = []
        self.version = "default"
        self._faults = faults

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if error := self._faults.pop(name, None):
                raise error
            if name == "set_version":
                (self.version,) = arguments
            return self.version

        return call


class FakeTransport:
    in_session: ClassVar[bool] = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = False
        self.sending = threading.Event()
        self.go = threading.Event()
        self.go.set()

    async def open(self, clients: Any) -> dict[Any, ServerError]:
        return {}

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        raise AssertionError("for weight streams only")

    def pack(self, bucket: Bucket) -> Any:
        async def send() -> dict[Any, ServerError]:
            self.sending.set()
            await asyncio.to_thread(self.go.wait, 10)
            self.sending.clear()
            del kept[:]
            if self.error:
                raise self.error
            return {}

        kept = [bucket]
        return send

    async def finish(self) -> dict[Any, ServerError]:
        return {}

    async def close(self) -> None:
        self.closed = True

    async def dispose(self) -> None:
        pass


SHAPES = {f"w{i}": (10,) for i in range(4)}


def buckets() -> Iterator[Bucket]:
    for name in SHAPES:
        yield Bucket.of([(name, torch.zeros(10))])


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("test")
    yield thread
    thread.close()


def publish(thread: LoopThread, transport: FakeTransport, stream: Any, *clients: FakeClient) -> Any:
    return Publisher(transport, SHAPES, thread).publish(clients, "run-1", stream)  # type: ignore[arg-type]


def test_the_session_in_order(thread: LoopThread) -> None:
    client = FakeClient()
    report = publish(thread, FakeTransport(), buckets(), client)
    assert client.calls == [
        *("pause", "set_version", "begin_update"),
        *("end_update", "flush_cache", "set_version", "resume", "weight_version"),
    ]
    assert report.served == (client,) and report.failures == {} and report.bytes == 4 * 40
    assert client.version == "run-1"


def test_one_bucket_is_made_while_another_is_sent_and_no_third(thread: LoopThread) -> None:
    transport, alive = FakeTransport(), []
    transport.go.clear()

    def watched() -> Iterator[Bucket]:
        for index, name in enumerate(SHAPES):
            if index == 1:
                assert transport.sending.wait(10), "nothing is sent while the next bucket is made"
                threading.Timer(0.2, transport.go.set).start()
            if index == 2:
                assert transport.go.is_set(), "a third bucket is made while the first is sent"
            assert sum(not memory.expired() for memory in alive) <= 1
            bucket = Bucket.of([(name, torch.zeros(10))])
            alive.append(StorageWeakRef(bucket.memory.untyped_storage()))
            yield bucket
            del bucket

    assert publish(thread, transport, watched(), FakeClient()).failures == {}


def test_no_bucket_is_made_past_a_faulty_one_while_another_is_sent(thread: LoopThread) -> None:
    """The third bucket has the first one's memory."""
    transport = FakeTransport()
    transport.go.clear()

    def watched() -> Iterator[Bucket]:
        yield Bucket.of([("w0", torch.zeros(10))])
        assert transport.sending.wait(10)
        threading.Timer(0.2, transport.go.set).start()
        yield Bucket.of([("unknown", torch.zeros(10))])
        assert transport.go.is_set(), "the third is made while the first is sent"
        yield Bucket.of([("w1", torch.zeros(10))])

    stream = watched()
    with pytest.raises(WeightError, match="unknown is unknown"):
        publish(thread, transport, stream, FakeClient())
    assert next(stream, None) is None


@pytest.mark.parametrize("call", ["pause", "set_version", "begin_update", "end_update", "flush_cache", "resume"])
def test_a_server_that_fails_is_set_free_and_the_other_served(thread: LoopThread, call: str) -> None:
    error = ServerError("http://fake", call, "no", retryable=True)
    bad, good = FakeClient(**{call: error}), FakeClient()
    report = publish(thread, FakeTransport(), buckets(), bad, good)
    assert report.served == (good,) and dict(report.failures) == {bad: error}
    assert bad.calls[-1] == "resume"
    if "begin_update" in bad.calls:
        assert "end_update" in bad.calls
    assert bad.version != "run-1" or call == "resume"


def test_a_server_that_says_another_version_is_not_served(thread: LoopThread) -> None:
    class Forgetful(FakeClient):
        async def weight_version(self) -> str:
            return "default"

    report = publish(thread, FakeTransport(), buckets(), Forgetful())
    assert report.served == () and "'default'" in str(next(iter(report.failures.values())))


def test_a_session_left_open_is_closed_first(thread: LoopThread) -> None:
    client = FakeClient(begin_update=ServerError("http://fake", "/begin", "status 400: already open"))
    assert publish(thread, FakeTransport(), buckets(), client).served == (client,)
    assert client.calls[2:5] == ["begin_update", "end_update", "begin_update"]


def test_where_sending_fails_here_the_stream_is_read_and_servers_are_set_free(thread: LoopThread) -> None:
    read: list[str] = []

    def watched() -> Iterator[Bucket]:
        for bucket in buckets():
            read.extend(name for name, _ in bucket)
            yield bucket

    client, transport = FakeClient(), FakeTransport(RolloutError("no room"))
    with pytest.raises(RolloutError, match="no room"):
        publish(thread, transport, watched(), client)
    assert read == list(SHAPES) and transport.closed
    assert client.calls[-2:] == ["end_update", "resume"] and client.version.startswith(UNFINISHED)


def test_an_interrupt_sets_servers_free(thread: LoopThread) -> None:
    def interrupted() -> Iterator[Bucket]:
        yield next(buckets())
        raise KeyboardInterrupt

    client, transport = FakeClient(), FakeTransport()
    with pytest.raises(KeyboardInterrupt):
        publish(thread, transport, interrupted(), client)
    assert transport.closed and client.calls[-2:] == ["end_update", "resume"]


def test_without_servers_the_stream_is_read(thread: LoopThread) -> None:
    report = publish(thread, FakeTransport(), buckets())
    assert report.served == () and report.bytes == 160


# Verification


class FakeServer(FakeClient):
    """Answers with the checksums of `weights`; the reset removes those that the publish does not write again."""

    def __init__(self, *ranks: dict[str, str], lost: str | None = None) -> None:
        super().__init__()
        self.ranks, self.lost = ranks, lost

    async def checksums(self) -> list[RankChecksums]:
        self.calls.append("checksums")
        return [RankChecksums(number, dict(by_name)) for number, by_name in enumerate(self.ranks)]

    async def randomize_weights(self) -> None:
        self.calls.append("randomize_weights")
        for by_name in self.ranks[1:]:
            by_name.update({self.lost: "random"} if self.lost else {})


def verified(thread: LoopThread, *clients: FakeClient) -> Any:
    publisher = Publisher(FakeTransport(), SHAPES, thread)  # type: ignore[arg-type]
    return publisher.publish(clients, "run-1", buckets(), verify=True)  # type: ignore[arg-type]


def test_weights_that_are_the_same_again_are_served(thread: LoopThread) -> None:
    server = FakeServer({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    assert verified(thread, server).served == (server,)
    assert server.calls == [
        *("pause", "set_version", "checksums", "randomize_weights", "begin_update", "end_update", "checksums"),
        *("flush_cache", "set_version", "resume", "weight_version"),
    ]


def test_a_weight_that_is_not_the_same_again_is_named_and_not_served(thread: LoopThread) -> None:
    bad, good = FakeServer({"a": "1", "b": "2"}, {"a": "3", "b": "4"}, lost="b"), FakeServer({"a": "1"})
    report = verified(thread, bad, good)
    assert report.served == (good,) and list(report.failures) == [bad]
    found = report.failures[bad]
    assert isinstance(found, WeightsChangedError)
    assert "1 of 2 parameters are not the same" in str(found) and "tensor-parallel ranks [1]: b. Fix: " in str(found)
    assert bad.version.startswith(UNFINISHED) and bad.calls[-1] == "resume"


def test_replicas_may_answer_in_any_order() -> None:
    one, two = RankChecksums(0, {"a": "1"}), RankChecksums(0, {"a": "2"})
    check_unchanged("url", [one, two], [two, one])
    with pytest.raises(WeightsChangedError, match=r"1 of 1 parameters.*ranks \[0\]: a\. "):
        check_unchanged("url", [one, two], [one, one])


@pytest.mark.parametrize("ranks", [[], [RankChecksums(0, {})]])
def test_a_server_without_checksums_is_not_verified(ranks: list[RankChecksums]) -> None:
    with pytest.raises(ServerError, match="no checksums"):
        check_unchanged("url", ranks, ranks)
