"""Standard output and error that are closed, full or gone, as when a terminal is lost or a reader ends."""

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
"""Error handler of the streams, as Python has it for standard error: names of models and folders may be any text."""


class OutputStream:
    """A text stream that outlives its file descriptor's reader.

    When a write fails, the descriptor is replaced by /dev/null, or by the file that `keep_going` names: also for C
    libraries, child processes, and what is still buffered. Characters that the stream's encoding lacks are written as
    escapes such as ``\\xef``.
    """

    def __init__(self, stream: TextIO | None, descriptor: int, *, strict: bool) -> None:
        """
        Args:
            stream: None where the descriptor was closed when the process started.
            descriptor: 1 or 2.
            strict: raise `OutputError` when a write fails, once.
        """
        self._stream: TextIO = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors=ESCAPED)
        self._descriptor, self._strict = descriptor, strict
        self._closed_at_start = stream is None
        self._fallback: Path | None = None
        self.lost = ""
        """The system's reason for which a write has failed; empty while none has."""

    def write(self, text: str) -> int:
        try:
            if self._closed_at_start:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # the latter: it has been closed since
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def keep_going(self, fallback: Path | None = None) -> None:
        """Raise nothing from now on. `fallback`: file that gets what is written after a write has failed."""
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
    """Open /dev/null for standard streams that are closed: the next file would get their numbers, and be printed to."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one


def install(*, strict: bool) -> None:
    """Guard this process's standard streams. Strict: a failed write to standard output raises `OutputError`."""
    open_missing()
    sys.stdout = cast(TextIO, OutputStream(sys.stdout, 1, strict=strict))
    sys.stderr = cast(TextIO, OutputStream(sys.stderr, 2, strict=False))


@contextmanager
def guarded() -> Iterator[None]:
    """While entered, the standard streams are guarded, and standard output is strict.

    The caller flushes standard output before it leaves: an error then would come too late.
    """
    before = sys.stdout, sys.stderr
    install(strict=True)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def keep_going(error_log: Path | None = None) -> None:
    """Let no lost output end this process: for work that goes on without a reader.

    Args:
        error_log: file for what is written to standard error after that is lost.
    """
    for stream, fallback in ((sys.stdout, None), (sys.stderr, error_log)):
        if isinstance(stream, OutputStream):
            stream.keep_going(fallback)
