"""Real SGLang servers for the tests in this folder.

They need an interpreter that has sglang, named by $SDPG_SGLANG_PYTHON (``scripts/test.sh --sglang`` sets it); without
one these tests are skipped. A server takes 20 to 60 s of two cores to start, so tests share what they can: `server`
lives until the session ends, and a test leaves it as it found it: alive, not paused, with no session of weight updates
open. Its weights may be any: a test that cares publishes its own first.
"""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpg_megatron.rollout.sglang.interpreter import PYTHON_VARIABLE
from sdpg_megatron.rollout.sglang.server import Launch, ServerProcess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the servers, of which several share two cores
START_LIMIT = 240.0
"""Seconds within which a server answers, on two cores that are busy otherwise."""
CPU_ARGUMENTS = ("--max-total-tokens", "20000", "--max-running-requests", "64", "--mem-fraction-static", "0.3")
"""Little memory and time for keys and values; SGLang would take a share of the machine's."""
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(PYTHON_VARIABLE):
        return
    reason = f"needs SGLang: scripts/test.sh --sglang, or set {PYTHON_VARIABLE} to an interpreter that has it"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    process: ServerProcess
    launch: Launch

    @property
    def url(self) -> str:
        return self.process.url


def wait_until_well(process: ServerProcess, limit: float = START_LIMIT) -> None:
    """Until a server answers that it is well; fails with the tail of its log where it ends or the time is up."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if not process.alive():
            pytest.fail(f"{process.url} ended:\n{process.log_tail(40)}")
        try:
            with urllib.request.urlopen(f"{process.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"{process.url} does not answer after {limit:g} s:\n{process.log_tail(40)}")


def handles(session: int) -> list[psutil.Process]:
    """The living processes of a session: all that a server process has started, where `session` is its pid."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def wait_until_gone(session: int, limit: float = 20.0) -> None:
    """Until a session has no living process; fails with those that are left when the time is up."""
    deadline = time.monotonic() + limit
    while left := handles(session):
        if time.monotonic() > deadline:
            pytest.fail(f"left after {limit:g} s: {[(p.pid, p.name()) for p in left]}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """The interpreter that has sglang."""
    return os.environ[PYTHON_VARIABLE]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny Qwen3 that the servers serve. It carries sampling defaults, as released models do."""
    # imports transformers, in vain where these tests are skipped
    from tests.tiny import add_sampling_defaults, write_tiny_model

    folder = write_tiny_model(tmp_path_factory.mktemp("sglang") / "model", "qwen3", tied=False, seed=0)
    add_sampling_defaults(folder)
    return folder


@pytest.fixture(scope="session")
def launch(sglang_python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Launch]:
    """A `Launch` of the tiny model on the CPU, with a log of its own; fields can be given another value."""
    logs = tmp_path_factory.mktemp("sglang-logs")
    count = iter(range(1000))

    def make(**changes: Any) -> Launch:
        basic = Launch(
            model=model,
            log=logs / f"{next(count)}.log",
            dtype="float32",
            device="cpu",
            python=sglang_python,
            arguments=CPU_ARGUMENTS,
        )
        return replace(basic, **changes)

    return make


class Servers:
    """Starts servers, and at the end stops them and proves that nothing of them is left."""

    def __init__(self, launch: Callable[..., Launch]) -> None:
        self._launch = launch
        self._processes: list[ServerProcess] = []

    def begin(self, **changes: Any) -> Running:
        """Start a server without waiting; `changes` are fields of its `Launch`."""
        launch = self._launch(**changes)
        process = ServerProcess(launch)
        self._processes.append(process)
        process.start()
        return Running(process, launch)

    def start(self, **changes: Any) -> Running:
        """Start a server and wait until it is well."""
        running = self.begin(**changes)
        wait_until_well(running.process)
        return running

    def close(self) -> None:
        pids = [process.pid for process in self._processes if process.pid is not None]
        for process in self._processes:
            process.stop(grace=0)
        for pid in pids:
            wait_until_gone(pid)


@pytest.fixture
def own_servers(launch: Callable[..., Launch]) -> Iterator[Servers]:
    """For a test that breaks its servers; each costs a start."""
    servers = Servers(launch)
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def server(launch: Callable[..., Launch]) -> Iterator[Running]:
    """One server for the whole session."""
    servers = Servers(launch)
    yield servers.start()
    servers.close()
