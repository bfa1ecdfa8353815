"""How buckets are laid out and shared, as far as that goes without a server; tests/sglang has the rest."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from sdpg_megatron.errors import RolloutError
from sdpg_megatron.rollout.base import Bucket
from sdpg_megatron.rollout.transports import SharedMemoryTransport
from sdpg_megatron.rollout.transports import shared_buffer as segment_module
from sdpg_megatron.rollout.transports.double_buffer import DoubleBuffer, Private
from sdpg_megatron.rollout.transports.flat import as_run, copy_to, lay_out
from sdpg_megatron.rollout.transports.shared import _handle
from sdpg_megatron.rollout.transports.shared_buffer import FOLDER, SharedMemoryBuffer, remove_leftovers

# A bucket as one run of bytes


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


# Shared memory

READER = """
import base64, pickle, sys, torch
for handle in sys.stdin.read().split():
    found = pickle.loads(base64.b64decode(handle))
    (span,) = found["metadata"]
    print(span.name, found["flattened_tensor"][span.start_idx : span.end_idx].view(span.dtype).sum().item())
"""
HOLDER = """
import sys
from sdpg_megatron.rollout.transports.shared_buffer import SharedMemoryBuffer
segment = SharedMemoryBuffer(1000)
print(segment._file, flush=True)
sys.stdin.read()
"""


def shm_managers() -> list[psutil.Process]:
    """torch's helpers of this process."""
    return [child for child in psutil.Process().children(recursive=True) if "shm_manager" in child.name()]


def test_other_processes_read_a_segment_and_nothing_stays() -> None:
    before, managers = torch.multiprocessing.get_sharing_strategy(), shm_managers()
    shared_buffer = SharedMemoryBuffer(100)
    flat = copy_to(shared_buffer.memory, [("w", torch.arange(5.0))])
    for reader in range(2):
        # Each ends with the memory still open, as one that is killed: what it leaves behind must not trouble the next.
        handle = _handle(flat, shared_buffer, reader)
        command = [sys.executable, "-c", READER]
        found = subprocess.run(command, input=f"{handle} {handle}", capture_output=True, text=True, timeout=120)
        assert found.stdout == "w 10.0\nw 10.0\n", found.stderr
    assert torch.multiprocessing.get_sharing_strategy() == before
    assert shm_managers() == managers
    files = f"{shared_buffer._file.name}*"
    assert list(FOLDER.glob(files))
    shared_buffer.release()
    assert not list(FOLDER.glob(files))


def test_memory_that_is_not_there_is_an_error_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_module, "PREFIX", prefix := f"sdpg-test-{os.getpid()}-")
    with pytest.raises(RolloutError, match="has no room for a bucket of"):
        SharedMemoryBuffer(1 << 50)
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


# Memory by turns


def test_buffers_are_used_by_turns_and_again_in_the_next_round() -> None:
    made: list[int] = []

    def make(size: int) -> Private:
        made.append(size)
        return Private(size)

    turns = DoubleBuffer(make)
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
    transport = SharedMemoryTransport()
    memory = transport.room(40, torch.device("cpu"))
    bucket = [("w", memory[:40].view(torch.float32))]
    flat, shared_buffer = transport.pack(bucket).args  # type: ignore[attr-defined]
    assert flat.run.data_ptr() == memory.data_ptr() and shared_buffer.memory.data_ptr() == memory.data_ptr()
    flat, shared_buffer = transport.pack([("w", torch.arange(10.0))]).args  # type: ignore[attr-defined]
    assert shared_buffer.memory.data_ptr() != memory.data_ptr(), "the bucket before it may be on its way still"
    assert flat.run.view(torch.float32).tolist() == list(range(10))
    asyncio.run(transport.dispose())


@pytest.mark.parametrize("module, name", [(os, "open"), (os, "posix_fallocate"), (mmap, "mmap")])
def test_without_room_to_share_a_bucket_is_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """Ranks that take part in making it must not wait for one that stopped."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_module, "PREFIX", prefix := f"sdpg-test-{os.getpid()}-")
    transport = SharedMemoryTransport()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        memory = transport.room(40, torch.device("cpu"))
        with pytest.raises(RolloutError, match="has no room for a bucket of"):
            transport.pack([("w", memory[:40].view(torch.float32))])
    assert not list(FOLDER.glob(f"{prefix}*"))


def test_readers_of_one_session_cannot_open_what_the_next_one_has() -> None:
    shared_buffer = SharedMemoryBuffer(100)
    shared_buffer.reduced(0)
    files = f"{shared_buffer._file.name}*"
    assert len(list(FOLDER.glob(files))) == 2
    shared_buffer.close_to_readers()
    assert list(FOLDER.glob(files)) == [shared_buffer._file]
    shared_buffer.release()
    assert not list(FOLDER.glob(files))


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

    shared_buffer = SharedMemoryBuffer(100)
    try:
        handle = _handle(copy_to(shared_buffer.memory, [("w", torch.arange(5.0))]), shared_buffer, 0)
        Listing(io.BytesIO(base64.b64decode(handle))).load()
    finally:
        shared_buffer.release()
    assert named <= allowed and ("types", "SimpleNamespace") in named


def test_no_two_sessions_share_a_readers_name() -> None:
    """What a server leaves behind removes what it had open when it died."""

    class Local:
        url = "http://127.0.0.1:9"

        async def server_info(self) -> dict[str, int]:
            return {"tp_size": 2}

    async def numbers(transport: SharedMemoryTransport, client: Any) -> list[int]:
        assert await transport.open([client]) == {}
        return list(transport._readers[client])

    transport, client = SharedMemoryTransport(), Local()
    found = [number for _ in range(2) for number in asyncio.run(numbers(transport, client))]
    assert len(set(found)) == 4
