"""Progress of work that is measured in bytes, with the time left: on a terminal a bar, else a line now and then."""

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
    """Show how far it is; what is yielded is to be told of each number of bytes that were moved, by any thread.

    Args:
        total: bytes.
        passes: how often each byte is moved, such as once written and once read back. Sizes shown are of one pass.
    """
    console = console or Console(stderr=True)
    started, moved, lock = time.monotonic(), 0.0, threading.Lock()
    said = started

    def say(text: str) -> None:
        console.print(f"{title}: {text}", highlight=False, soft_wrap=True)

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(nbytes: int) -> None:
            nonlocal moved, said
            with lock:
                moved += nbytes / passes
                now = time.monotonic()
                if not console.is_terminal and now - said >= EVERY:
                    said = now
                    left = timedelta(seconds=round((now - started) * (total - moved) / max(moved, 1)))
                    say(f"{moved / 1e6:,.0f} of {total / 1e6:,.0f} MB, {left} left")
            bar.update(task, advance=nbytes / passes)

        yield advance
    say(f"{moved / 1e6:,.0f} MB in {time.monotonic() - started:.1f} s")
