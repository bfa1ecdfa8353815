"""The trainer's ranks on this machine: torchrun, in a session of its own, and its children."""

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
"""By its name: to import it would take seconds, and this process stays small."""
END_SECONDS = 30.0
"""That torchrun gets to notice that its ranks are gone."""


def shell_code(code: int) -> int:
    """As a shell has it: 128 + the signal where that ended a process."""
    return code if code >= 0 else 128 - code


class TorchrunProcess:
    """Started once. Signals go to the ranks themselves.

    torchrun would kill them 30 seconds after it passed one on, and forget their exit codes.
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
            node: of `nodes`, those that have ranks; `ranks` on each.
            address: of the first of them, where torchrun's store is, at `port`.
            run: names this start.
            logs: folder for what each rank says. The first rank's output is shown, too.
        """
        line = [sys.executable, "-m", TORCHRUN, str(os.getpid())]
        line += [f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={ranks}", f"--rdzv-id={run}"]
        # Static: ranks are numbered in the order of the machines. The other rendezvous numbers them as they come, and
        # gives out host names where this one takes the address that it is told.
        line += ["--rdzv-backend=static", f"--master-addr={address}", f"--master-port={port}", "--max-restarts=0"]
        line += [f"--log-dir={logs}", "--redirects=3", *(["--tee=0:3"] if node == 0 else [])]
        logs.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [*line, "-m", "sdpg_megatron", *train], start_new_session=True, env=dict(environment)
        )

    def poll(self) -> int | None:
        """The exit code: 75 where the ranks have stopped and saved, else the first failure's; None while they run."""
        code = self._process.poll()
        return None if code is None else shell_code(code)

    def signal(self, number: int) -> None:
        """Pass a signal on to the ranks; where there are none yet, torchrun gets it."""
        for process in self._ranks() or [self._process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(number)

    def kill(self) -> None:
        """End them at once: nothing that they could still say or save is worth waiting for."""
        if self.poll() is None:
            self.signal(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        if self.poll() is None:
            self._process.kill()  # which ends what it has started
            self._process.wait()

    def _ranks(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self._process.pid).children()
        return found
