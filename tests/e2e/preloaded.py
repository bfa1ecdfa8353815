"""A process that has imported what runs import, and becomes one by forking: the imports take longer than a tiny run.

A fork does what ``python -m MODULE`` does, but all forks have the same hash seed. `Preloaded` is the side that asks,
`main` the process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

IMPORTED = (
    "matplotlib.backends.backend_agg",
    "sdpg_megatron.train.eval_command",
    "sdpg_megatron.train.loop",
    "sdpg_megatron.train.eval_target",
    "tensorboard.summary.writer.record_writer",
    "transformers.models.qwen3.modeling_qwen3",
)

SINGLE_THREADED = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Otherwise the allocator of pyarrow starts a thread when imported."""


class Preloaded:
    """Runs modules, one after another."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """`folder` is the working directory, of the runs, too; `environment` is that of the imports."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=folder,
            env={**environment, **SINGLE_THREADED},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._numbers(timeout=120)

    def run(
        self, module: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with ``python -m module *arguments`` does, its output captured as text.

        Several environments are for as many processes at once. Where one fails, the others are killed, and its exit
        code is the one returned.
        """
        line = [sys.executable, "-m", module, *arguments]
        with tempfile.TemporaryDirectory() as folder:
            (code,) = self._run(line[2:], environments, timeout, folder)
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
            return subprocess.CompletedProcess(line, code, out, err)

    def run_with_lost(
        self,
        module: str,
        arguments: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        timeout: float,
        lost: int,
    ) -> list[tuple[int, str]]:
        """Exit code and standard error of each process. The `lost` one alone is killed, when the others have ended."""
        with tempfile.TemporaryDirectory() as folder:
            codes = self._run([module, *arguments], environments, timeout, folder, lost=lost)
            errs = [Path(folder, f"err{number}").read_text() for number in range(len(environments))]
            return list(zip(codes, errs, strict=True))

    def _run(
        self,
        line: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        timeout: float,
        folder: str,
        lost: int | None = None,
    ) -> list[int]:
        request = {"line": line, "environments": environments, "folder": folder, "lost": lost}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pids = self._numbers(timeout)
        try:
            return self._numbers(timeout)
        except BaseException:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._numbers(timeout)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _numbers(self, timeout: float) -> list[int]:
        """What the process says next."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"the run did not end within {timeout:g} s")
        said = self._process.stdout.readline()
        assert said, "the preloaded process has ended"
        return [int(number) for number in said.split()]


def main() -> None:
    """Say 0 once all is imported; then fork for each line of standard input, and say the forks' pids and exit code."""
    for name in IMPORTED:
        importlib.import_module(name)
    # A fork has the thread that forks and no other: what others are at, or hold, would stay so for ever.
    assert psutil.Process().num_threads() == 1, "an import started threads"
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run and for those who wait for it
    say(0)
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for number, environment in enumerate(request["environments"]):
            pids.append(os.fork())
            if not pids[-1]:
                signal.signal(signal.SIGINT, on_interrupt)
                err = "err" if request["lost"] is None else f"err{number}"
                os._exit(become(request["line"], environment, Path(request["folder"]), err))
        say(*pids)
        say(*([wait(pids)] if request["lost"] is None else wait_for_all(pids, request["lost"])))


def say(*numbers: int) -> None:
    sys.stdout.write(" ".join(map(str, numbers)) + "\n")
    sys.stdout.flush()


def wait(pids: Sequence[int]) -> int:
    """The exit code of the first process that fails, when its peers are killed; 0 where none does."""
    left, failed = set(pids), 0
    while left:
        pid, status = os.wait()
        left.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            for peer in left:
                os.kill(peer, signal.SIGKILL)
    return failed


def wait_for_all(pids: Sequence[int], lost: int) -> list[int]:
    """The exit code of each process; the `lost` one may have to be killed, once the others have ended."""
    codes = {}
    for pid in [*pids[:lost], *pids[lost + 1 :]]:
        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.kill(pids[lost], signal.SIGKILL)
    codes[pids[lost]] = os.waitstatus_to_exitcode(os.waitpid(pids[lost], 0)[1])
    return [codes[pid] for pid in pids]


def become(line: Sequence[str], environment: Mapping[str, str], folder: Path, err: str) -> int:
    """Be the process that was asked for, with its output in the folder, and give its exit code."""
    os.environ.clear()
    os.environ.update(environment)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, folder / "out", flags), (2, folder / err, flags)):
        descriptor = os.open(path, mode)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    return run_as_main(*line)


def run_as_main(module: str, *arguments: str) -> int:
    """Do what ``python -m MODULE`` does in this process, a fork; returns the exit code.

    It ends as Python does, but that what was imported is not taken apart: that would take two seconds.
    """
    np.random.seed()  # Python's own generator does so by itself
    sys.argv[1:] = arguments
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):  # Python prints it
            sys.stderr.write(f"{ended.code}\n")
        code = 1 if isinstance(ended.code, str) else int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # closed, full or gone
            stream.flush()
    return code


if __name__ == "__main__":
    main()
