"""Render evaluations as tables for a terminal or a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from sdpg_megatron.evaluation.estimators import Estimate
from sdpg_megatron.evaluation.scores import Scores

LOG_WIDTH = 240
"""Line width for outputs other than terminals, which rich would wrap at 80 columns."""


def show(title: str, table: Table, output: TextIO) -> None:
    """Print a title and a table."""
    console = Console(file=output)
    console = console if console.is_terminal else Console(file=output, width=LOG_WIDTH)
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def scores_table(scores: Mapping[str, Scores], differences: Sequence[Mapping[str, Estimate]] = ()) -> Table:
    """Table with a column for each data file of an evaluation, or for each evaluation of a data file.

    Args:
        differences: differences of each column from the first, by quantity, shown below its values; empty for none.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("", no_wrap=True)
    for column in scores:
        table.add_column(column, justify="right", overflow="fold")
    table.add_row("problems", *(str(found.problems) for found in scores.values()))
    for name in dict.fromkeys(name for found in scores.values() for name in found.estimates):
        shown = [_lines(name, found.estimates.get(name), "") for found in scores.values()]
        below = [_lines(name, found.get(name), "+") for found in differences or [{}] * len(scores)]
        table.add_row(name, *("\n".join(filter(None, pair)) or "-" for pair in zip(shown, below, strict=True)))
    table.add_row("verifier failures", *(str(found.failures) for found in scores.values()))
    return table


def _lines(name: str, estimate: Estimate | None, sign: str) -> str:
    """Format an estimate as ``0.609 (0.523 to 0.695)``; empty for None."""
    if estimate is None:
        return ""
    form = f"{sign}.1f" if name == "length" else f"{sign}.3f"
    value, low, high = (format(number, form) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"
