"""The publishing session and its sinks, as far as they go without a server; tests/sglang has the rest."""

from __future__ import annotations

import asyncio
import base64
import io
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sdpg_megatron.errors import RolloutError, ServerError, WeightError
from sdpg_megatron.rollout.base import Bucket
from sdpg_megatron.rollout.sglang.client import Timeouts
from sdpg_megatron.rollout.sglang.loop import LoopThread
from sdpg_megatron.rollout.sglang.publish import UNFINISHED, Publisher
from sdpg_megatron.rollout.sglang.sinks import SharedSink
from sdpg_megatron.rollout.sglang.sinks import attempt as attempt_module
from sdpg_megatron.rollout.sglang.sinks import segment as segment_module
from sdpg_megatron.rollout.sglang.sinks.attempt import Outcome, attempt
from sdpg_megatron.rollout.sglang.sinks.flat import as_run, copy_to, lay_out
from sdpg_megatron.rollout.sglang.sinks.segment import FOLDER, Segment, remove_leftovers
from sdpg_megatron.rollout.sglang.sinks.shared import _handle
from sdpg_megatron.rollout.sglang.sinks.turns import Private, Turns

# --- a bucket as one run of bytes


def mixed() -> list[tuple[str, Tensor]]:
    """An odd number of two-byte elements stands before four-byte ones."""
    return [
        ("a", torch.arange(7).bfloat16()),
        ("b", torch.arange(12.0).view(3, 4)),
        ("c", torch.arange(5).to(torch.uint8)),
        ("d", torch.arange(6.0).view(2, 3).T),
    ]


def read_back(run: Tensor, spans: Any) -> dict[str, Tensor]:
    """As SGLang does it: tensor after tensor, no gaps."""
    found, end = {}, 0
    for span in spans:
        size = span.shape.numel() * span.dtype.itemsize
        assert end % span.dtype.itemsize == 0
        found[span.name] = run[end : end + size].view(span.dtype).reshape(span.shape)
        end += size
    assert end == run.numel()
    return found


@pytest.mark.parametrize("pack", [as_run, lambda bucket: copy_to(torch.empty(1000, dtype=torch.uint8), bucket)])
def test_a_bucket_of_mixed_types_reads_back(pack: Callable[[Bucket], Any]) -> None:
    flat = pack(mixed())
    found = read_back(flat.run, flat.spans)
    for name, tensor in mixed():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_bucket_that_is_one_run_already_is_not_copied() -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    bucket = [("a", memory[8:16].view(torch.float32)), ("b", memory[16:40].view(torch.float32).view(2, 3))]
    assert as_run(bucket).run.data_ptr() == memory.data_ptr() + 8
    assert as_run(bucket).run.numel() == 32
    apart = [("a", memory[8:16].view(torch.float32)), ("b", memory[20:40].view(torch.float32))]
    assert as_run(apart).run.data_ptr() != memory.data_ptr() + 8
    assert torch.equal(as_run(apart).run, torch.cat([memory[8:16], memory[20:40]]))


def test_order_is_kept_among_equals() -> None:
    bucket = [(name, torch.zeros(3)) for name in "bca"]
    assert [span.name for span, _ in lay_out(bucket)] == ["b", "c", "a"]


# --- shared memory

READER = """
import base64, pickle, sys, torch
for handle in sys.stdin.read().split():
    found = pickle.loads(base64.b64decode(handle))
    (span,) = found["metadata"]
    print(span.name, found["flattened_tensor"][span.start_idx : span.end_idx].view(span.dtype).sum().item())
"""
HOLDER = """
import sys
from sdpg_megatron.rollout.sglang.sinks.segment import Segment
segment = Segment(1000)
print(segment._file, flush=True)
sys.stdin.read()
"""


def shm_managers() -> list[psutil.Process]:
    """torch's helpers of this process."""
    return [child for child in psutil.Process().children(recursive=True) if "shm_manager" in child.name()]


def test_other_processes_read_a_segment_and_nothing_stays() -> None:
    before, managers = torch.multiprocessing.get_sharing_strategy(), shm_managers()
    segment = Segment(100)
    flat = copy_to(segment.memory, [("w", torch.arange(5.0))])
    for reader in range(2):
        # Each ends with the memory still open, as one that is killed: what it leaves behind must not trouble the next.
        handle = _handle(flat, segment, reader)
        command = [sys.executable, "-c", READER]
        found = subprocess.run(command, input=f"{handle} {handle}", capture_output=True, text=True, timeout=120)
        assert found.stdout == "w 10.0\nw 10.0\n", found.stderr
    assert torch.multiprocessing.get_sharing_strategy() == before
    assert shm_managers() == managers
    files = f"{segment._file.name}*"
    assert list(FOLDER.glob(files))
    segment.release()
    assert not list(FOLDER.glob(files))


def test_memory_that_is_not_there_is_an_error_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_module, "PREFIX", prefix := f"sdpg-test-{os.getpid()}-")
    with pytest.raises(RolloutError, match="has no room for a bucket of"):
        Segment(1 << 50)
    assert not list(FOLDER.glob(f"{prefix}*"))


def test_segments_of_the_dead_go_and_those_of_the_living_stay() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        file = Path(holder.stdout.readline().decode().strip())
        remove_leftovers()
        assert file.exists()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    # Another run on this machine may have removed it by now.
    remove_leftovers()
    assert not file.exists()


# --- memory by turns


def test_buffers_are_used_by_turns_and_again_in_the_next_round() -> None:
    made: list[int] = []

    def make(size: int) -> Private:
        made.append(size)
        return Private(size)

    turns = Turns(make)
    for _ in range(2):
        turns.restart()
        first, second, third = (turns.take(size) for size in (100, 30, 80))
        assert first is third and first is not second
    assert made == [100, 30]
    turns.restart()
    turns.take(100)
    assert turns.take(50).size == 50, "one that is too small is replaced"
    assert made == [100, 30, 50]
    assert turns.holding(first.memory[10:20]) is first
    assert turns.holding(second.memory) is turns.holding(torch.zeros(3)) is None


def test_a_segments_bucket_is_not_copied_to_be_shared() -> None:
    sink = SharedSink()
    memory = sink.room(40, torch.device("cpu"))
    bucket = [("w", memory[:40].view(torch.float32))]
    flat, segment = sink.pack(bucket).args  # type: ignore[attr-defined]
    assert flat.run.data_ptr() == memory.data_ptr() and segment.memory.data_ptr() == memory.data_ptr()
    flat, segment = sink.pack([("w", torch.arange(10.0))]).args  # type: ignore[attr-defined]
    assert segment.memory.data_ptr() != memory.data_ptr(), "the bucket before it may be on its way still"
    assert flat.run.view(torch.float32).tolist() == list(range(10))
    asyncio.run(sink.dispose())


@pytest.mark.parametrize("module, name", [(os, "open"), (os, "posix_fallocate"), (mmap, "mmap")])
def test_without_room_to_share_a_bucket_is_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """Ranks that take part in making it must not wait for one that stopped."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_module, "PREFIX", prefix := f"sdpg-test-{os.getpid()}-")
    sink = SharedSink()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        memory = sink.room(40, torch.device("cpu"))
        with pytest.raises(RolloutError, match="has no room for a bucket of"):
            sink.pack([("w", memory[:40].view(torch.float32))])
    assert not list(FOLDER.glob(f"{prefix}*"))


def test_readers_of_one_session_cannot_open_what_the_next_one_has() -> None:
    segment = Segment(100)
    segment.reduced(0)
    files = f"{segment._file.name}*"
    assert len(list(FOLDER.glob(files))) == 2
    segment.close_to_readers()
    assert list(FOLDER.glob(files)) == [segment._file]
    segment.release()
    assert not list(FOLDER.glob(files))


# --- whose fault it was


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


def judge(scene: Callable[[FakeGroup, FakePeer, FakePeer], tuple[Any, Any, Any]]) -> tuple[Outcome, Any, Any]:
    """`scene` gives the first peer's call, the second's, and this process's own part."""

    async def play() -> tuple[Outcome, Any, Any]:
        group, one, two = FakeGroup(), FakePeer(), FakePeer()
        first, second, own = scene(group, one, two)
        calls: dict[Any, Any] = {one: first, two: second}
        outcome = await attempt(group, calls, own, 0.5)  # type: ignore[arg-type]
        assert outcome.well or group.destroyed.is_set()
        return outcome, one, two

    return asyncio.run(play())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_module, "GRACE", 0.1)
    monkeypatch.setattr(attempt_module, "SETTLE", 0.3)


REFUSED = ServerError("http://peer", "/receive", "status 400: no session")
GONE = ServerError("http://peer", "/receive", "ServerDisconnectedError", retryable=True)


def test_all_well() -> None:
    outcome, *_ = judge(lambda group, one, two: (asyncio.sleep(0), asyncio.sleep(0.01), asyncio.sleep(0)))
    assert outcome.well


def test_a_server_that_is_gone_is_to_blame_and_one_that_waited_for_it_is_not(quick: None) -> None:
    outcome, one, two = judge(
        lambda group, one, two: (fail(GONE, OSError()), group.wait_in_it(), fail(RuntimeError("closed")))
    )
    assert dict(outcome.failed) == {one: GONE} and outcome.spoiled == {two}


def test_a_server_that_noticed_first_is_not_to_blame(quick: None) -> None:
    async def later() -> None:
        await asyncio.sleep(0.05)
        raise GONE from OSError()

    outcome, one, two = judge(lambda group, one, two: (fail(REFUSED), later(), fail(RuntimeError("closed"))))
    assert dict(outcome.failed) == {two: GONE} and outcome.spoiled == {one}


def test_a_server_that_refuses_is_told_to_leave_which_ends_the_broadcast(quick: None) -> None:
    outcome, one, two = judge(
        lambda group, one, two: (fail(REFUSED), group.wait_in_it(), end(one.left, RuntimeError("closed")))
    )
    assert dict(outcome.failed) == {one: REFUSED} and outcome.spoiled == {two}
    assert isinstance(outcome.own, RuntimeError) and not two.left.is_set()


def test_a_server_that_never_answers_is_to_blame(quick: None) -> None:
    outcome, one, two = judge(lambda group, one, two: (asyncio.sleep(60), group.wait_in_it(), asyncio.sleep(60)))
    assert list(outcome.failed) == [one] and outcome.spoiled == {two}


def test_nobody_is_to_blame_for_this_process(quick: None) -> None:
    outcome, *_ = judge(lambda group, one, two: (asyncio.sleep(0), asyncio.sleep(0), fail(RuntimeError("own"))))
    assert not outcome.well and not outcome.failed and not outcome.spoiled


# --- the session


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


class FakeSink:
    in_session: ClassVar[bool] = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.closed = False
        self.sending = threading.Event()
        self.go = threading.Event()
        self.go.set()

    async def open(self, clients: Any) -> dict[Any, ServerError]:
        return {}

    def room(self, nbytes: int, device: torch.device) -> Tensor:
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

        kept = list(bucket)
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
        yield [(name, torch.zeros(10))]


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("test")
    yield thread
    thread.close()


def publish(thread: LoopThread, sink: FakeSink, stream: Any, *clients: FakeClient) -> Any:
    return Publisher(sink, SHAPES, thread).publish(clients, "run-1", stream)  # type: ignore[arg-type]


def test_the_session_in_order(thread: LoopThread) -> None:
    client = FakeClient()
    report = publish(thread, FakeSink(), buckets(), client)
    assert client.calls == [
        *("pause", "set_version", "begin_update"),
        *("end_update", "flush_cache", "set_version", "resume", "weight_version"),
    ]
    assert report.served == (client,) and report.failures == {} and report.bytes == 4 * 40
    assert client.version == "run-1"


def test_one_bucket_is_made_while_another_is_sent_and_no_third(thread: LoopThread) -> None:
    sink, alive = FakeSink(), []
    sink.go.clear()

    def watched() -> Iterator[Bucket]:
        for index, name in enumerate(SHAPES):
            if index == 1:
                assert sink.sending.wait(10), "nothing is sent while the next bucket is made"
                threading.Timer(0.2, sink.go.set).start()
            if index == 2:
                assert sink.go.is_set(), "a third bucket is made while the first is sent"
            assert sum(not memory.expired() for memory in alive) <= 1
            bucket = [(name, torch.zeros(10))]
            alive.append(StorageWeakRef(bucket[0][1].untyped_storage()))
            yield bucket
            del bucket

    assert publish(thread, sink, watched(), FakeClient()).failures == {}


def test_no_bucket_is_made_past_a_faulty_one_while_another_is_sent(thread: LoopThread) -> None:
    """The third bucket has the first one's memory."""
    sink = FakeSink()
    sink.go.clear()

    def watched() -> Iterator[Bucket]:
        yield [("w0", torch.zeros(10))]
        assert sink.sending.wait(10)
        threading.Timer(0.2, sink.go.set).start()
        yield [("unknown", torch.zeros(10))]
        assert sink.go.is_set(), "the third is made while the first is sent"
        yield [("w1", torch.zeros(10))]

    stream = watched()
    with pytest.raises(WeightError, match="unknown is unknown"):
        publish(thread, sink, stream, FakeClient())
    assert next(stream, None) is None


@pytest.mark.parametrize("call", ["pause", "set_version", "begin_update", "end_update", "flush_cache", "resume"])
def test_a_server_that_fails_is_set_free_and_the_other_served(thread: LoopThread, call: str) -> None:
    error = ServerError("http://fake", call, "no", retryable=True)
    bad, good = FakeClient(**{call: error}), FakeClient()
    report = publish(thread, FakeSink(), buckets(), bad, good)
    assert report.served == (good,) and dict(report.failures) == {bad: error}
    assert bad.calls[-1] == "resume"
    if "begin_update" in bad.calls:
        assert "end_update" in bad.calls
    assert bad.version != "run-1" or call == "resume"


def test_a_server_that_says_another_version_is_not_served(thread: LoopThread) -> None:
    class Forgetful(FakeClient):
        async def weight_version(self) -> str:
            return "default"

    report = publish(thread, FakeSink(), buckets(), Forgetful())
    assert report.served == () and "'default'" in str(next(iter(report.failures.values())))


def test_a_session_left_open_is_closed_first(thread: LoopThread) -> None:
    client = FakeClient(begin_update=ServerError("http://fake", "/begin", "status 400: already open"))
    assert publish(thread, FakeSink(), buckets(), client).served == (client,)
    assert client.calls[2:5] == ["begin_update", "end_update", "begin_update"]


def test_where_sending_fails_here_the_stream_is_read_and_servers_are_set_free(thread: LoopThread) -> None:
    read: list[str] = []

    def watched() -> Iterator[Bucket]:
        for bucket in buckets():
            read.extend(name for name, _ in bucket)
            yield bucket

    client, sink = FakeClient(), FakeSink(RolloutError("no room"))
    with pytest.raises(RolloutError, match="no room"):
        publish(thread, sink, watched(), client)
    assert read == list(SHAPES) and sink.closed
    assert client.calls[-2:] == ["end_update", "resume"] and client.version.startswith(UNFINISHED)


def test_an_interrupt_sets_servers_free(thread: LoopThread) -> None:
    def interrupted() -> Iterator[Bucket]:
        yield next(buckets())
        raise KeyboardInterrupt

    client, sink = FakeClient(), FakeSink()
    with pytest.raises(KeyboardInterrupt):
        publish(thread, sink, interrupted(), client)
    assert sink.closed and client.calls[-2:] == ["end_update", "resume"]


def test_without_servers_the_stream_is_read(thread: LoopThread) -> None:
    report = publish(thread, FakeSink(), buckets())
    assert report.served == () and report.bytes == 160


def test_handles_name_only_what_a_server_lets_a_pickle_name() -> None:
    """The list is SGLang's, as far as it is used: sglang.srt.utils.common.SafeUnpickler of 0.5.23."""
    allowed = {
        ("torch.multiprocessing.reductions", "rebuild_tensor"),
        ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        ("torch.storage", "UntypedStorage"),
        ("types", "SimpleNamespace"),
        ("torch", "Tensor"),
        ("torch", "Size"),
        ("torch", "uint8"),
        ("torch", "float32"),
        ("_codecs", "encode"),
    }
    named: set[tuple[str, str]] = set()

    class Listing(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    segment = Segment(100)
    try:
        handle = _handle(copy_to(segment.memory, [("w", torch.arange(5.0))]), segment, 0)
        Listing(io.BytesIO(base64.b64decode(handle))).load()
    finally:
        segment.release()
    assert named <= allowed and ("types", "SimpleNamespace") in named
