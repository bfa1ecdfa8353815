"""Live progress: one aligned row a step; on a terminal, a bar below with the present phase and the time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

HEADER_EVERY = 20
"""Rows between two headers."""


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    metric: str
    form: str


COLUMNS = (
    Column("reward", "reward/mean", "6.3f"),
    Column("accuracy", "eval/sampled_accuracy", "8.3f"),
    Column("greedy", "eval/greedy_accuracy", "6.3f"),
    Column("KL", "distill/kl", "6.4f"),
    Column("entropy", "train/entropy", "7.3f"),
    Column("gate", "distill/gate_rate", "4.2f"),
    Column("length", "rollout/length", "6.1f"),
    Column("tok/s", "speed/tokens_per_second", "6,.0f"),
)


class Progress:
    """Shows a run on the console. Rows go to any output; the bar needs a terminal. Not enabled, it shows nothing."""

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total: steps of the whole run.
            done: steps that earlier calls did; they do not count for the time left.
            enabled: true on the one rank that prints.
            clock: seconds from any origin.
        """
        self._total, self._first, self._enabled, self._clock = total, done, enabled, clock
        self._console = console or Console()
        self._started = clock()
        self._rows = 0
        self._phase = ""
        self._step_width = max(len("step"), 2 * len(str(total)) + 1)
        self._bar = RichProgress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left"),
            console=self._console,
            transient=True,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total, completed=done, left="-")
        self._bar.start()

    def phase(self, name: str) -> None:
        """Say what the step is doing now; seen on a terminal only."""
        self._phase = name
        self._bar.update(self._task, description=name, refresh=True)

    def count(self, done: int, total: int) -> None:
        """Say how many groups are generated, in whatever phase; from any thread."""
        self._bar.update(self._task, description=f"{self._phase}, {done}/{total} groups", refresh=True)

    def message(self, text: str) -> None:
        """Print a line of its own."""
        if self._enabled:
            # soft_wrap: a log has no width, and rich would break its lines at 80 columns
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._console.file.flush()
            logger.info("%s", text)  # for `run_log.RunLog`; nobody else listens

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics after `step` steps (0: before the first); a metric that is not there is shown as "-"."""
        left = format_seconds(self._seconds_left(step))
        if self._rows % HEADER_EVERY == 0:
            self.message(
                "  ".join(
                    [f"{'step':>{self._step_width}}", *(f"{c.title:>{_width(c)}}" for c in COLUMNS), f"{'left':>7}"]
                )
            )
        self._rows += 1
        cells = (f"{values[c.metric]:{c.form}}" if c.metric in values else "-".rjust(_width(c)) for c in COLUMNS)
        self.message("  ".join([f"{f'{step}/{self._total}':>{self._step_width}}", *cells, f"{left:>7}"]))
        self._bar.update(self._task, completed=step, left=left, refresh=True)

    def close(self) -> None:
        """Take the bar away; the rows stay."""
        self._bar.stop()

    def _seconds_left(self, step: int) -> float | None:
        """From the mean time of the steps done here; None before the first."""
        steps_here = step - self._first
        if steps_here <= 0:
            return None
        return (self._clock() - self._started) / steps_here * (self._total - step)


def format_seconds(seconds: float | None) -> str:
    """``m:ss`` or ``h:mm:ss``; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _width(column: Column) -> int:
    return max(len(column.title), len(f"{0.0:{column.form}}"))
