"""Progress of reading data files, which can take minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console

INTERVAL = 10.0
"""Seconds between two lines if the output is not a terminal."""


class RowProgress:
    """Shows the number of rows read: a status line on a terminal, else a line at intervals."""

    def __init__(
        self, *, enabled: bool = True, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`enabled`: true on the one rank that prints."""
        self._console = console or Console(stderr=True)
        self._enabled, self._clock = enabled, clock
        self._printed = clock()
        self._status = self._console.status("reading prompts")

    def __enter__(self) -> RowProgress:
        if self._enabled and self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def __call__(self, rows: int) -> None:
        """Show that `rows` rows have been read."""
        if not self._enabled:
            return
        text = f"reading prompts: {rows:,} rows"
        if self._console.is_terminal:
            self._status.update(text)
        elif self._clock() - self._printed >= INTERVAL:
            self._printed = self._clock()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
