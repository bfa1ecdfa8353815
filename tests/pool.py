"""Worker processes that stand for ranks. They start once and serve every distributed test of a run of the suite.

Jobs and results travel as plain pickles: functions by reference, tensors by value.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from sdpg_megatron.runtime.run_lock import end_with_parent

COLLECTIVE_TIMEOUT = timedelta(seconds=120)


class RankError(Exception):
    """A rank raised, died or hung. The message holds each such rank's traceback."""


@dataclass(frozen=True)
class _Worker:
    process: ForkServerProcess
    pipe: Connection[Any, Any]

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class RankPool:
    """Runs module-level functions on several ranks.

    Workers are started when a test first needs that many. Any failure ends all of them, so that the next test gets
    clean ones: a process group with a lost member cannot be trusted again.
    """

    def __init__(self, size: int = 4, timeout: float = 300.0, grace: float = 3.0) -> None:
        """`timeout`: seconds for one job; `grace`: seconds that the other ranks get once one has failed."""
        self.size = size
        self.timeout = timeout
        self.grace = grace
        self._workers: list[_Worker] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on ranks 0..world_size-1 of a fresh Gloo default process group.

        Every rank starts from the same random seed, with one thread and without CUDA. The group, and Megatron's model
        parallel state if there is one, are gone when this returns.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: some rank raised, died or did not finish in time.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size {world_size} is not in 1..{self.size}")
        while len(self._workers) < world_size:
            self._workers.append(_start())
        workers = self._workers[:world_size]
        # Test modules are imported by name in the workers, from wherever the test runner found them.
        job = pickle.dumps((function, args, kwargs))
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(workers):
                worker.pipe.send((sys.path, folder, rank, world_size))
                worker.pipe.send_bytes(job)
            try:
                return self._collect(workers, Path(folder))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End every worker. The next `run` starts new ones."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def _collect(self, workers: list[_Worker], folder: Path) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending = {worker.pipe: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + self.timeout
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pending.pop(pipe)
                succeeded, value = _receive(workers[rank])
                (results if succeeded else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + self.grace)
        if pending and not failures:
            for rank in pending.values():
                failures[rank] = f"did not finish within {self.timeout:g} s\n{_stack(workers[rank], rank, folder)}"
        if failures:
            raise RankError("\n".join(f"rank {rank} of {len(workers)}: {failures[rank]}" for rank in sorted(failures)))
        return [results[rank] for rank in range(len(workers))]


IMPORTED = ("tests.pool", "sdpg_megatron.mcore.policy_trainer", "sdpg_megatron.weights")
"""Modules that workers find imported, as they are forks of a process that has done so once."""


def _start() -> _Worker:
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _receive(worker: _Worker) -> tuple[bool, Any]:
    try:
        succeeded, value = pickle.loads(worker.pipe.recv_bytes())
    except EOFError:
        worker.process.join()
        return False, f"died with exit code {worker.process.exitcode}"
    return succeeded, value


def _stack(worker: _Worker, rank: int, folder: Path) -> str:
    """Where a worker hangs: its signal handler writes that to a file."""
    assert worker.process.pid is not None
    os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    return _stack_file(folder, rank).read_text()


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _serve(pipe: Connection[Any, Any]) -> None:
    """A worker's life: one job after another until the pipe closes, or the test runner is gone."""
    end_with_parent(os.getppid())  # the server that forked it, which ends with the test runner
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    while True:
        try:
            path, folder, rank, world_size = pipe.recv()
            job = pipe.recv_bytes()
        except EOFError:
            return
        sys.path[:] = path
        try:
            with _stack_file(Path(folder), rank).open("w") as stack:
                faulthandler.register(signal.SIGUSR1, file=stack)
                answer = pickle.dumps((True, _run_job(job, Path(folder), rank, world_size)))
        except BaseException:
            # Sent before any clean-up: a peer may be waiting in a collective, which only the parent can end.
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)


def _run_job(job: bytes, folder: Path, rank: int, world_size: int) -> Any:
    function, args, kwargs = pickle.loads(job)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo",
        store=FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    result = function(*args, **kwargs)
    dist.barrier()  # nobody leaves while a peer still reads from it
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    _let_go_of_groups()
    return result


def _let_go_of_groups() -> None:
    """Free what a job left behind. Models hold process groups, whose threads would poll as long as the worker lives.

    Python's collector does not see the cycle from Megatron's wrapper over its optimizer to its gradient hooks and back:
    nodes of autograd's graph are part of it.
    """
    distributed = sys.modules.get("megatron.core.distributed")
    if distributed is not None:
        for found in gc.get_objects():  # those of this job only: the others are frozen
            if issubclass(type(found), distributed.DistributedDataParallel):  # a weak proxy's class may be gone
                vars(found).clear()
    gc.collect()
    gc.freeze()  # modules and caches, a million objects, which each later collection would traverse
