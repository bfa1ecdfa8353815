"""Progress in bytes with the time left: a bar on a terminal, else a line at intervals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

EVERY = 30.0
"""Seconds between two lines."""


@contextmanager
def transfer(
    title: str, total: int, console: Console | None = None, *, passes: int = 1
) -> Iterator[Callable[[int], None]]:
    """Show progress; yields a thread-safe function that adds a number of moved bytes.

    Args:
        total: bytes.
        passes: number of times each byte is moved, for example 2 for a write and a read. Sizes shown are of one pass.
    """
    console = console or Console(stderr=True)
    started, moved, lock = time.monotonic(), 0.0, threading.Lock()
    printed = started

    def show(text: str) -> None:
        console.print(f"{title}: {text}", highlight=False, soft_wrap=True)

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(nbytes: int) -> None:
            nonlocal moved, printed
            with lock:
                moved += nbytes / passes
                now = time.monotonic()
                if not console.is_terminal and now - printed >= EVERY:
                    printed = now
                    left = timedelta(seconds=round((now - started) * (total - moved) / max(moved, 1)))
                    show(f"{moved / 1e6:,.0f} of {total / 1e6:,.0f} MB, {left} left")
            bar.update(task, advance=nbytes / passes)

        yield advance
    show(f"{moved / 1e6:,.0f} MB in {time.monotonic() - started:.1f} s")
