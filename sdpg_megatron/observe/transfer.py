"""Progress of work that is measured in bytes: on a terminal a bar with the rate and the time left, else one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def transfer(title: str, total: int, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far it is; what is yielded is to be told of each number of bytes that were moved, by any thread."""
    console = console or Console(stderr=True)
    started, moved, lock = time.monotonic(), 0, threading.Lock()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(nbytes: int) -> None:
            nonlocal moved
            with lock:
                moved += nbytes
            bar.update(task, advance=nbytes)

        yield advance
    console.print(
        f"{title}: {moved / 1e6:,.0f} MB in {time.monotonic() - started:.1f} s", highlight=False, soft_wrap=True
    )
