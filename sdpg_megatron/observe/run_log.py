"""Log file of a run: progress, warnings and the final error, with times."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from sdpg_megatron.errors import SdpgError
from sdpg_megatron.observe import progress

LOG_FILE, OLDER_LOG_FILE = "log.txt", "log.1.txt"
LIMIT = 64 << 20
"""Size in bytes beyond which a call starts a new file; one older file is kept."""
FORMAT, TIME_FORMAT = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"


class RunLog:
    """While entered, append to log.txt in the run's folder. For the main rank only.

    Never raises: the metrics writer reports a full disk.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / LOG_FILE
        with suppress(OSError):
            if path.stat().st_size > LIMIT:
                path.replace(run_dir / OLDER_LOG_FILE)
        self._handler = _QuietHandler(path, encoding="utf-8", delay=True, errors="backslashreplace")
        self._handler.setFormatter(logging.Formatter(FORMAT, TIME_FORMAT))

    def __enter__(self) -> RunLog:
        logging.getLogger().addHandler(self._handler)
        progress.logger.addHandler(self._handler)
        progress.logger.setLevel(logging.INFO)
        progress.logger.propagate = False  # the console has shown it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SdpgError):
            progress.logger.error("%s: %s", type(error).__name__, error)
        elif error is not None:
            progress.logger.error("ended by an error", exc_info=error)
        for logger in (logging.getLogger(), progress.logger):
            logger.removeHandler(self._handler)
        self._handler.close()


class _QuietHandler(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # the file is opened at the first record
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Suppress the traceback for each line that a full disk rejects."""
