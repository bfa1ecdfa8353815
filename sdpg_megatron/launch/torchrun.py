"""torchrun that exits with the ranks' exit code and shows the end of a failed rank's log.

    python -m sdpg_megatron.launch.torchrun LAUNCHER ARGUMENT...

LAUNCHER is the id of the parent process; torchrun ends when it ends. Plain torchrun exits with 1, whatever a rank's
exit code.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sdpg_megatron.launch.torchrun_process import shell_code
from sdpg_megatron.process import streams
from sdpg_megatron.process.signals import STOPPED
from sdpg_megatron.runtime.run_lock import end_with_parent

TAIL = 20
"""Lines of a failed rank's log to show."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun to its end; returns the exit code."""
    launcher, *rest = arguments
    end_with_parent(int(launcher))
    streams.install(strict=False)
    torchrun: Any = run  # untyped
    options = torchrun.parse_args(rest)
    # It logs every exit code but 0 as a failure, also 75 of ranks that have stopped and saved.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        failures = first_failures(error.failures)
        for rank, failure in failures.items():
            if failure.exitcode != STOPPED:
                sys.stderr.write(_describe(rank, failure, Path(options.log_dir), options.rdzv_id))
        return shell_code(next(iter(failures.values())).exitcode)
    except SignalException as error:  # before the ranks were started
        return 128 + error.sigval
    return 0


def first_failures(failures: Mapping[int, ProcessFailure]) -> Mapping[int, ProcessFailure]:
    """Failures without the ranks that torchrun itself ended after another rank had failed, or had stopped and saved."""
    real = {rank: failure for rank, failure in failures.items() if failure.exitcode not in (STOPPED, -signal.SIGTERM)}
    stopped = {rank: failure for rank, failure in failures.items() if failure.exitcode == STOPPED}
    return real or stopped or failures


def _describe(rank: int, failure: ProcessFailure, logs: Path, start: str) -> str:
    text = f"launch: rank {rank} ended with exit code {shell_code(failure.exitcode)}"
    for log in logs.glob(f"{start}_*/attempt_0/{failure.local_rank}/stderr.log"):
        text += f"; its log is {log}"
        if rank:  # rank 0's output has been shown
            text += ", which ends with:\n" + "\n".join(
                log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
            )
    return text + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
