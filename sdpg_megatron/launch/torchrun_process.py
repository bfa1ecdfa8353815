"""Trainer ranks of this machine: a torchrun process in its own session, and its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

TORCHRUN = "sdpg_megatron.launch.torchrun"
"""Started by module name: importing it takes seconds and memory."""
EXIT_SECONDS = 30.0
"""Seconds for torchrun to notice that its ranks have ended."""


def shell_code(code: int) -> int:
    """Exit code as a shell reports it: 128 + the signal for a process ended by a signal."""
    return code if code >= 0 else 128 - code


class TorchrunProcess:
    """One torchrun process. Signals go directly to the ranks.

    torchrun kills ranks 30 seconds after it forwards a signal, and drops their exit codes.
    """

    def __init__(
        self,
        train: Sequence[str],
        *,
        node: int,
        nodes: int,
        ranks: int,
        address: str,
        port: int,
        run: str,
        logs: Path,
        environment: Mapping[str, str],
    ) -> None:
        """
        Args:
            train: arguments of the rank's program.
            node: index of this machine among the `nodes` with ranks, each with `ranks` ranks.
            address: host of torchrun's store, the first machine with ranks; `port` is its port.
            run: identifier of this start.
            logs: folder for the output of each rank. Rank 0's output is also shown.
        """
        line = [sys.executable, "-m", TORCHRUN, str(os.getpid())]
        line += [f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={ranks}", f"--rdzv-id={run}"]
        # Static: ranks are numbered in the order of the machines. The other rendezvous numbers them in the order of
        # arrival and uses host names instead of the given address.
        line += ["--rdzv-backend=static", f"--master-addr={address}", f"--master-port={port}", "--max-restarts=0"]
        line += [f"--log-dir={logs}", "--redirects=3", *(["--tee=0:3"] if node == 0 else [])]
        logs.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [*line, "-m", "sdpg_megatron", *train], start_new_session=True, env=dict(environment)
        )

    def poll(self) -> int | None:
        """Exit code: 75 if the ranks have stopped and saved, else the first failure's; None while they run."""
        code = self._process.poll()
        return None if code is None else shell_code(code)

    def signal(self, number: int) -> None:
        """Send a signal to the ranks, or to torchrun if there are none yet."""
        for process in self._ranks() or [self._process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(number)

    def kill(self) -> None:
        """Kill the ranks and torchrun at once."""
        if self.poll() is None:
            self.signal(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_SECONDS)
        if self.poll() is None:
            self._process.kill()  # its children end with it
            self._process.wait()

    def _ranks(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self._process.pid).children()
        return found
