"""Megatron's writing of a distributed checkpoint, in the foreground or behind the training, with sums of the files.

Behind the training means: a forked process of each rank writes the state as it was at the fork (GPU tensors, and memory
that is pinned or shared, are copied to the host before); the rest, which takes all ranks, is done at the next step
boundary that finds all of them ready.
"""

from __future__ import annotations

import inspect
import pickle
import queue
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import Tensor

from sdpg_megatron.checkpoint.files import FileSum, fsync_and_hash
from sdpg_megatron.mcore.transfer import host_copy

RESULTS = ".results_"
"""Names of what a rank's writer leaves for the rank, in the folder that is being written; with the rank's number."""


class Writing:
    """One checkpoint on its way to the disk. Every rank makes it, and calls `finish` until it says True."""

    def __init__(self, state: dict[str, Any], folder: Path, *, behind: bool) -> None:
        """Begin. `behind`: return as soon as the state may change; else once this rank's share is written.

        Raises:
            OSError, RuntimeError: the disk refused what is written before the shares, on the first rank.
        """
        self._results = WriteResults(folder / f"{RESULTS}{dist.get_rank()}")
        _hand_to_megatron(self._results)
        request: Any = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **_strategy())
        self._staged: list[Any] = []
        """Tensors that the writer reads. torch reuses pinned memory as soon as its tensor is gone."""
        if request.async_fn is not None:
            write = partial(_write_and_seal, request.async_fn, self._results, folder, dist.get_rank())
            stage = partial(self._stage, request.async_fn_args[1])
            request = request._replace(async_fn=write, preload_fn=stage)
        self._queue: AsyncCallsQueue | None = None
        if behind:
            self._queue = AsyncCallsQueue()
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def _stage(self, buckets: Sequence[Any]) -> list[Any]:
        """Return Megatron's buckets with tensors in host memory that no later step writes to. Replaces its function."""
        self._staged = [
            (path, name, (data, [(item, _unchanging(tensor)) for item, tensor in tensors]))
            for path, name, (data, tensors) in buckets
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._staged

    def finish(self, *, wait: bool) -> bool:
        """Whether the files are there, on all ranks and from all ranks; has to be called until it says so.

        Raises:
            torch.distributed.checkpoint.CheckpointException: a rank could not write; on every rank.
        """
        if self._queue is None:
            return True
        return bool(self._queue.maybe_finalize_async_calls(blocking=wait))

    def sums(self) -> dict[str, FileSum]:
        """Of the files that this rank wrote."""
        return self._results.take_sums()


class WriteResults:
    """What a rank's writer found: for Megatron, a queue; and the sums of the files.

    In memory where the writer is this process, in a file where it was forked. Megatron's own, a process with a server,
    takes seconds to start and outlives a rank that is killed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._value: Any = None
        self._sums: dict[str, FileSum] = {}

    def put(self, value: Any) -> None:
        """Of Megatron's queue: the results, or an error."""
        self._value = value

    def get_nowait(self) -> Any:
        """Of Megatron's queue.

        Raises:
            queue.Empty: the writer was ended, or could not leave word.
        """
        if self._value is None:
            with suppress(OSError, EOFError, pickle.UnpicklingError):
                self._value, self._sums = pickle.loads(self._path.read_bytes())
        if self._value is None:
            raise queue.Empty
        return self._value

    def fsync_and_hash(self, files: list[Path]) -> None:
        """Flush and sum up what was written, and leave word for the process that has forked this one."""
        self._sums = {path.name: fsync_and_hash(path) for path in files}
        self.leave_word()

    def leave_word(self) -> None:
        self._path.write_bytes(pickle.dumps((self._value, self._sums)))

    def take_sums(self) -> dict[str, FileSum]:
        self._path.unlink(missing_ok=True)
        return self._sums


def _write_and_seal(
    write: Callable[..., None], results: WriteResults, folder: Path, rank: int, *arguments: Any, **options: Any
) -> None:
    """What the writer does. An error is left as a result: Megatron raises it on all ranks."""
    try:
        write(*arguments, **options)
        results.fsync_and_hash(sorted(folder.glob(f"__{rank}_*")))
    except Exception as error:
        results.put(RuntimeError(f"{type(error).__name__}: {error}"))
        with suppress(OSError):
            results.leave_word()


def _unchanging(tensor: Tensor) -> Tensor:
    """A tensor's numbers in host memory, as they are now whatever the trainer does; GPU tensors are not waited for.

    A forked process keeps ordinary memory as it was, but not memory that is shared or pinned, as that of a GPU run's
    teachers and of offloaded optimizer state is.
    """
    if tensor.device.type != "cpu":
        return host_copy(tensor)
    shared = tensor.untyped_storage().is_shared() or tensor.is_pinned()
    return tensor.clone() if shared else tensor


def _hand_to_megatron(results: WriteResults) -> None:
    """In the place of the queue that megatron-core (0.16 to 0.19) would make; it can go when that takes one."""
    module: Any = filesystem_async
    module._results_queue = results


def _strategy() -> dict[str, Any]:
    """From 0.19 on megatron-core wants another package for this, unless it is told to use its own."""
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}
