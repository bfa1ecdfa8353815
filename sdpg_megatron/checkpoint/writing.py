"""Write Megatron's distributed checkpoints, synchronously or in the background, and digest the files.

In the background a forked process of each rank writes the state as of the fork; GPU, pinned and shared tensors are
copied to host memory first. The collective part follows at the next step boundary at which all ranks' processes are
done.
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
"""Prefix of the file that passes a writer's results to its rank; followed by the rank's number."""


class Writing:
    """A checkpoint that is being written. Collective; call `finish` until it returns True."""

    def __init__(self, state: dict[str, Any], folder: Path, *, behind: bool) -> None:
        """Start writing. `behind`: return as soon as the state may change, else after this rank's share is written.

        Raises:
            OSError, RuntimeError: rank 0 could not write the files that precede the shares.
        """
        self._results = WriteResults(folder / f"{RESULTS}{dist.get_rank()}")
        _hand_to_megatron(self._results)
        request: Any = dist_checkpointing.save(state, str(folder), async_sharded_save=True, **_strategy())
        self._staged: list[Any] = []
        """Tensors that the writer reads: torch reuses pinned memory as soon as its tensor is freed."""
        if request.async_fn is not None:
            write = partial(_write_and_hash, request.async_fn, self._results, folder, dist.get_rank())
            stage = partial(self._stage, request.async_fn_args[1])
            request = request._replace(async_fn=write, preload_fn=stage)
        self._queue: AsyncCallsQueue | None = None
        if behind:
            self._queue = AsyncCallsQueue()
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def _stage(self, buckets: Sequence[Any]) -> list[Any]:
        """Return Megatron's buckets with tensors in unchanging host memory. Replaces Megatron's preload function."""
        self._staged = [
            (path, name, (data, [(item, _unchanging(tensor)) for item, tensor in tensors]))
            for path, name, (data, tensors) in buckets
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._staged

    def finish(self, *, wait: bool) -> bool:
        """True if the files of all ranks are written. Collective; call until it returns True.

        Raises:
            torch.distributed.checkpoint.CheckpointException: a rank could not write; on every rank.
        """
        if self._queue is None:
            return True
        return bool(self._queue.maybe_finalize_async_calls(blocking=wait))

    def sums(self) -> dict[str, FileSum]:
        """Size and digest of the files that this rank wrote."""
        return self._results.take_sums()


class WriteResults:
    """Results of a rank's writer, as the queue that Megatron expects, with the digests of the files.

    They are in memory if the writer is this process, in a file if it was forked. Megatron's own queue is a server
    process, which takes seconds to start and outlives a killed rank.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._value: Any = None
        self._sums: dict[str, FileSum] = {}

    def put(self, value: Any) -> None:
        """Set the results, or an error. Method of Megatron's queue."""
        self._value = value

    def get_nowait(self) -> Any:
        """Return the results. Method of Megatron's queue.

        Raises:
            queue.Empty: the writer was killed, or could not write its results.
        """
        if self._value is None:
            with suppress(OSError, EOFError, pickle.UnpicklingError):
                self._value, self._sums = pickle.loads(self._path.read_bytes())
        if self._value is None:
            raise queue.Empty
        return self._value

    def fsync_and_hash(self, files: list[Path]) -> None:
        """Flush and hash the written files, and save the results for the parent process."""
        self._sums = {path.name: fsync_and_hash(path) for path in files}
        self.save()

    def save(self) -> None:
        self._path.write_bytes(pickle.dumps((self._value, self._sums)))

    def take_sums(self) -> dict[str, FileSum]:
        self._path.unlink(missing_ok=True)
        return self._sums


def _write_and_hash(
    write: Callable[..., None], results: WriteResults, folder: Path, rank: int, *arguments: Any, **options: Any
) -> None:
    """Body of the writer. An error becomes a result, which Megatron raises on all ranks."""
    try:
        write(*arguments, **options)
        results.fsync_and_hash(sorted(folder.glob(f"__{rank}_*")))
    except Exception as error:
        results.put(RuntimeError(f"{type(error).__name__}: {error}"))
        with suppress(OSError):
            results.save()


def _unchanging(tensor: Tensor) -> Tensor:
    """Copy of a tensor in host memory that later steps do not change; copies from the GPU are not waited for.

    A fork keeps ordinary memory as it was, but not shared or pinned memory, such as that of a GPU run's teachers and of
    offloaded optimizer state.
    """
    if tensor.device.type != "cpu":
        return host_copy(tensor)
    shared = tensor.untyped_storage().is_shared() or tensor.is_pinned()
    return tensor.clone() if shared else tensor


def _hand_to_megatron(results: WriteResults) -> None:
    """Set the queue that megatron-core (0.16 to 0.19) would create. Removable once its API accepts a queue."""
    module: Any = filesystem_async
    module._results_queue = results


def _strategy() -> dict[str, Any]:
    """Select megatron-core's own asynchronous writer: from 0.19 on its default is another package."""
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}
