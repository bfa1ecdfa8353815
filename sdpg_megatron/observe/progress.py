"""Live progress: one aligned row per step; on a terminal also a bar with the current phase and the time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

HEADER_EVERY = 20
"""Rows between two headers."""
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
"""As in the log, in local time."""
EVAL_SECONDS = "time/eval"


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
    """Shows a run on the console: rows on any output, the bar on a terminal only. Silent if not enabled."""

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        evaluations: Callable[[int], int] = lambda step: 0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """
        Args:
            total: steps of the whole run.
            done: steps of earlier calls, which do not count for the time left.
            evaluations: number of evaluations after that of the given step.
            enabled: true on the one rank that prints.
            clock: monotonic seconds.
            now: time of day.
        """
        self._total, self._first, self._enabled, self._clock, self._now = total, done, enabled, clock, now
        self._console = console or Console()
        self._started: float | None = None
        self._evaluations_left = evaluations
        self._evaluations: list[float] = []
        self._recalled: list[float] = []
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

    def recall(self, records: Sequence[Mapping[str, float]]) -> None:
        """Take evaluation times from records of earlier calls, for use until this call has evaluated."""
        self._recalled = [record[EVAL_SECONDS] for record in records if EVAL_SECONDS in record]

    def phase(self, name: str) -> None:
        """Show the current phase, on a terminal only. The first call starts the clock."""
        if self._started is None:
            self._started = self._clock()
        self._phase = name
        self._bar.update(self._task, description=name, refresh=True)

    def count(self, done: int, total: int) -> None:
        """Show the number of generated groups. Thread-safe."""
        self._bar.update(self._task, description=f"{self._phase}, {done}/{total} groups", refresh=True)

    def message(self, text: str) -> None:
        """Print text; the time precedes its first line."""
        self._print(text, f"{self._stamp()} ")

    def _stamp(self) -> str:
        return self._now().strftime(TIME_FORMAT)

    def _print(self, text: str, prefix: str) -> None:
        if self._enabled:
            # soft_wrap: else rich breaks the lines of a log at 80 columns
            self._console.print(prefix + text, markup=False, highlight=False, soft_wrap=True)
            self._console.file.flush()
            logger.info("%s", text)  # read by `run_log.RunLog` only

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics after `step` steps (0: before the first); missing ones as "-"."""
        if EVAL_SECONDS in values:
            self._evaluations.append(values[EVAL_SECONDS])
        left = format_seconds(self._seconds_left(step))
        if self._rows % HEADER_EVERY == 0:
            titles = [f"{'step':>{self._step_width}}", *(f"{c.title:>{_width(c)}}" for c in COLUMNS), f"{'left':>7}"]
            self._row("time", titles)
        self._rows += 1
        cells = (f"{values[c.metric]:{c.form}}" if c.metric in values else "-".rjust(_width(c)) for c in COLUMNS)
        self._row(self._stamp(), [f"{f'{step}/{self._total}':>{self._step_width}}", *cells, f"{left:>7}"])
        self._bar.update(self._task, completed=step, left=left, refresh=True)

    def _row(self, stamp: str, cells: Sequence[str]) -> None:
        """Print the time and the cells; without the time on a narrow terminal."""
        row, prefix = "  ".join(cells), f"{stamp:<{len(self._stamp())}}  "
        narrow = self._console.is_terminal and self._console.width < len(prefix + row)
        self._print(row, "" if narrow else prefix)

    def close(self) -> None:
        """Remove the bar; the rows stay."""
        self._bar.stop()

    def _seconds_left(self, step: int) -> float | None:
        """Estimate from the mean times of this call's steps and evaluations; None before the first step."""
        steps_here = step - self._first
        if steps_here <= 0 or self._started is None:
            return None
        step_seconds = (self._clock() - self._started - sum(self._evaluations)) / steps_here
        measured = self._evaluations or self._recalled
        eval_seconds = sum(measured) / len(measured) if measured else 0.0
        return step_seconds * (self._total - step) + eval_seconds * self._evaluations_left(step)


def format_seconds(seconds: float | None) -> str:
    """Format as ``m:ss`` or ``h:mm:ss``; "-" for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _width(column: Column) -> int:
    return max(len(column.title), len(f"{0.0:{column.form}}"))
