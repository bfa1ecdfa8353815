"""torchrun with the ranks' exit code, and the end of the log of a rank that failed.

    python -m sdpg_megatron.launch.torchrun LAUNCHER ARGUMENT...

LAUNCHER is the process whose child this is, and with which it ends. torchrun itself exits with 1, whatever a rank's
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
"""Lines."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun to its end."""
    launcher, *rest = arguments
    end_with_parent(int(launcher))
    streams.install(strict=False)
    torchrun: Any = run  # without types
    options = torchrun.parse_args(rest)
    # It calls every exit code but 0 a failure, also that of ranks that have stopped and saved.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        failures = first_failures(error.failures)
        for rank, failure in failures.items():
            if failure.exitcode != STOPPED:
                sys.stderr.write(_describe(rank, failure, Path(options.log_dir), options.rdzv_id))
        return shell_code(next(iter(failures.values())).exitcode)
    except SignalException as error:  # there were no ranks yet
        return 128 + error.sigval
    return 0


def first_failures(failures: Mapping[int, ProcessFailure]) -> Mapping[int, ProcessFailure]:
    """Without the ranks that torchrun itself has ended, when one had failed, or was done with saving before them."""
    real = {rank: failure for rank, failure in failures.items() if failure.exitcode not in (STOPPED, -signal.SIGTERM)}
    stopped = {rank: failure for rank, failure in failures.items() if failure.exitcode == STOPPED}
    return real or stopped or failures


def _describe(rank: int, failure: ProcessFailure, logs: Path, start: str) -> str:
    told = f"launch: rank {rank} ended with exit code {shell_code(failure.exitcode)}"
    for log in logs.glob(f"{start}_*/attempt_0/{failure.local_rank}/stderr.log"):
        told += f"; its log is {log}"
        if rank:  # what the first rank says was shown
            told += ", which ends with:\n" + "\n".join(
                log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
            )
    return told + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
