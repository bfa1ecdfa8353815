"""Standard output and error that survive a closed descriptor, a full disk, a lost terminal or the end of a reader."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from sdpg_megatron.errors import OutputError

logger = logging.getLogger(__name__)

NAMES = {1: "standard output", 2: "standard error"}
ESCAPED = "backslashreplace"
"""Error handler of the streams, Python's default for standard error: names of models and folders may be any text."""


class OutputStream:
    """Text stream that survives the loss of its file descriptor's reader.

    When a write fails, the descriptor is replaced by /dev/null, or by the file given to `keep_going`, also for C
    libraries, child processes and buffered text. Characters that the stream's encoding lacks are written as escapes
    such as ``\\xef``.
    """

    def __init__(self, stream: TextIO | None, descriptor: int, *, strict: bool) -> None:
        """
        Args:
            stream: None if the descriptor was closed when the process started.
            descriptor: 1 or 2.
            strict: raise `OutputError` at the first write that fails.
        """
        self._stream: TextIO = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors=ESCAPED)
        self._descriptor, self._strict = descriptor, strict
        self._closed_at_start = stream is None
        self._fallback: Path | None = None
        self.lost = ""
        """The system's reason for the first failed write; empty if none has failed."""

    def write(self, text: str) -> int:
        try:
            if self._closed_at_start:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed since
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def keep_going(self, fallback: Path | None = None) -> None:
        """Never raise again. `fallback`: file for the output that follows a failed write."""
        self._strict, self._fallback = False, fallback
        if self.lost:
            self._replace()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError | ValueError) -> None:
        strict, self._strict = self._strict, False
        self._closed_at_start = False
        first, self.lost = not self.lost, self.lost or getattr(error, "strerror", None) or str(error)
        self._replace()
        if strict:
            raise OutputError(NAMES[self._descriptor], self.lost, reader_ended=isinstance(error, BrokenPipeError))
        with suppress(OSError, ValueError):
            self._stream.flush()
        if first:
            logger.warning("%s is lost (%s)", NAMES[self._descriptor], self.lost)

    def _replace(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            if self._fallback is not None:
                self._fallback.parent.mkdir(parents=True, exist_ok=True)
            new = os.open(self._fallback or os.devnull, flags, 0o644)
        except OSError:
            new = os.open(os.devnull, os.O_WRONLY)
        try:
            own = self._stream.fileno()
        except (OSError, ValueError):  # a stream without a descriptor, or closed
            own = -1
        if own == self._descriptor:
            os.dup2(new, own)
            os.close(new)
        else:
            self._stream = os.fdopen(new, "w", encoding="utf-8", errors=ESCAPED)


def open_missing() -> None:
    """Open /dev/null for standard streams that are closed: else the next file opened would receive the output."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one


def install(*, strict: bool) -> None:
    """Guard this process's standard streams. Strict: a failed write to standard output raises `OutputError`."""
    open_missing()
    sys.stdout = cast(TextIO, OutputStream(sys.stdout, 1, strict=strict))
    sys.stderr = cast(TextIO, OutputStream(sys.stderr, 2, strict=False))


@contextmanager
def guarded() -> Iterator[None]:
    """Guard the standard streams while entered; standard output is strict.

    The caller flushes standard output before it leaves; later errors are not raised.
    """
    before = sys.stdout, sys.stderr
    install(strict=True)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def keep_going(error_log: Path | None = None) -> None:
    """Let no lost output end this process. For work that continues without a reader.

    Args:
        error_log: file for standard error after it is lost.
    """
    for stream, fallback in ((sys.stdout, None), (sys.stderr, error_log)):
        if isinstance(stream, OutputStream):
            stream.keep_going(fallback)
