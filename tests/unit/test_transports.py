"""How buckets are laid out and shared, as far as that goes without a server; tests/sglang has the rest."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from sdpg_megatron.errors import RolloutError
from sdpg_megatron.rollout.transports import SharedMemoryTransport
from sdpg_megatron.rollout.transports import shared_buffer as buffer_module
from sdpg_megatron.rollout.transports.shared import _handle
from sdpg_megatron.rollout.transports.shared_buffer import FOLDER, DoubleBuffer, SharedMemoryBuffer, remove_leftovers
from sdpg_megatron.weights.bucket import Bucket, TensorSpec

# A bucket as one run of bytes


def mixed() -> list[tuple[str, Tensor]]:
    """An odd number of two-byte elements stands before four-byte ones."""
    return [
        ("a", torch.arange(7).bfloat16()),
        ("b", torch.arange(12.0).view(3, 4)),
        ("c", torch.arange(5).to(torch.uint8)),
        ("d", torch.arange(6.0).view(2, 3).T),
    ]


def read_back(bucket: Bucket) -> dict[str, Tensor]:
    """As SGLang does it: tensor after tensor, no gaps."""
    found, end = {}, 0
    for spec in bucket.specs:
        size = math.prod(spec.shape) * spec.dtype.itemsize
        assert end == spec.start and end % spec.dtype.itemsize == 0
        found[spec.name] = bucket.memory[end : end + size].view(spec.dtype).reshape(spec.shape)
        end += size
        assert end == spec.end
    assert end == bucket.memory.numel()
    return found


def test_a_bucket_of_mixed_types_reads_back() -> None:
    bucket = Bucket.of(mixed())
    assert [name for name, _ in bucket] == ["b", "d", "a", "c"], "larger elements first, else in the given order"
    for found in (read_back(bucket), dict(bucket)):
        for name, tensor in mixed():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_bucket_is_made_in_given_memory() -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    bucket = Bucket([TensorSpec("w", torch.float32, (2, 3))], allocate=lambda nbytes, device: memory)
    assert bucket.memory.data_ptr() == memory.data_ptr() and bucket.memory.numel() == 24
    dict(bucket)["w"].fill_(1)
    assert memory.view(torch.float32).tolist() == [1.0] * 6 + [0.0] * 19


def test_a_bucket_may_be_empty() -> None:
    assert not Bucket(()) and list(Bucket.of([])) == [] and Bucket(()).memory.numel() == 0


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
buffer = SharedMemoryBuffer(1000)
print(buffer._file, flush=True)
sys.stdin.read()
"""


def in_buffer(buffer: SharedMemoryBuffer) -> tuple[Tensor, Sequence[TensorSpec]]:
    """One tensor in a shared buffer, of sum 10."""
    bucket = Bucket([TensorSpec("w", torch.float32, (5,))], allocate=lambda nbytes, device: buffer.memory)
    dict(bucket)["w"].copy_(torch.arange(5.0))
    return bucket.memory, bucket.specs


def shm_managers() -> list[psutil.Process]:
    """torch's helpers of this process."""
    return [child for child in psutil.Process().children(recursive=True) if "shm_manager" in child.name()]


def test_other_processes_read_a_segment_and_nothing_stays() -> None:
    before, managers = torch.multiprocessing.get_sharing_strategy(), shm_managers()
    shared_buffer = SharedMemoryBuffer(100)
    memory, specs = in_buffer(shared_buffer)
    for reader in range(2):
        # Each ends with the memory still open, as one that is killed: what it leaves behind must not trouble the next.
        handle = _handle(memory, specs, shared_buffer, reader)
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
    monkeypatch.setattr(buffer_module, "PREFIX", prefix := f"sdpg-test-{os.getpid()}-")
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
    turns = DoubleBuffer()
    for _ in range(2):
        turns.restart()
        first, second, third = (turns.take(size) for size in (100, 30, 80))
        assert first is third and first is not second
        assert [first.size, second.size] == [100, 30]
    turns.restart()
    turns.take(100)
    assert turns.take(50).size == 50, "one that is too small is replaced"
    assert turns.holding(first.memory[10:20]) is first
    assert turns.holding(torch.zeros(3)) is None
    turns.release()
    assert first.memory.numel() == 0


def test_a_bucket_in_shared_memory_is_not_copied() -> None:
    transport = SharedMemoryTransport()
    made = Bucket([TensorSpec("w", torch.float32, (10,))], allocate=transport.allocate)
    memory, _, buffer = transport.pack(made).args  # type: ignore[attr-defined]
    assert memory.data_ptr() == made.memory.data_ptr() == buffer.memory.data_ptr()
    memory, _, buffer = transport.pack(Bucket.of([("w", torch.arange(10.0))])).args  # type: ignore[attr-defined]
    assert buffer.memory.data_ptr() != made.memory.data_ptr(), "the previous bucket may not be sent yet"
    assert memory.view(torch.float32).tolist() == list(range(10))
    asyncio.run(transport.dispose())


@pytest.mark.parametrize("module, name", [(os, "open"), (os, "posix_fallocate"), (mmap, "mmap")])
def test_without_room_to_share_a_bucket_is_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """Ranks that take part in making it must not wait for one that stopped."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(buffer_module, "PREFIX", prefix := f"sdpg-test-{os.getpid()}-")
    transport = SharedMemoryTransport()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        bucket = Bucket([TensorSpec("w", torch.float32, (10,))], allocate=transport.allocate)
        with pytest.raises(RolloutError, match="has no room for a bucket of"):
            transport.pack(bucket)
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
        handle = _handle(*in_buffer(shared_buffer), shared_buffer, 0)
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
