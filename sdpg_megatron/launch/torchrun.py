"""torchrun with the ranks' exit code, and the end of the log of a rank that failed.

    python -m sdpg_megatron.launch.torchrun LAUNCHER ARGUMENT...

LAUNCHER is the process whose child this is, and with which it ends. torchrun itself exits with 1, whatever a rank's
exit code.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sdpg_megatron.cli import STOPPED
from sdpg_megatron.train.presence import end_with_parent

TAIL = 20
"""Lines."""


def main(arguments: Sequence[str]) -> int:
    """Run torchrun to its end."""
    launcher, *rest = arguments
    end_with_parent(int(launcher))
    # It calls every exit code but 0 a failure, also that of ranks that have stopped and saved.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.main(rest)
    except ChildFailedError as error:
        failures = {rank: failure for rank, failure in error.failures.items() if failure.exitcode != STOPPED}
        for rank, failure in failures.items():
            sys.stderr.write(_describe(rank, failure))
        return next((_code(failure) for failure in failures.values()), STOPPED)
    return 0


def _code(failure: ProcessFailure) -> int:
    """As a shell has it: 128 + the signal where that ended the rank."""
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def _describe(rank: int, failure: ProcessFailure) -> str:
    log = Path(failure.error_file).with_name("stderr.log")
    try:
        tail = "".join(f"  {line}\n" for line in log.read_text(errors="replace").splitlines()[-TAIL:])
    except OSError:
        tail = ""
    return f"launch: rank {rank} ended with exit code {_code(failure)}; the end of {log}:\n{tail}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
