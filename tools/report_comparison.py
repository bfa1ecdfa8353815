"""Tables and plots of the runs of examples/compare_methods.sh, which differ in method and seed.

    python tools/report_comparison.py runs/compare [--out DIR]

Reads the finished runs in NAME/seed_N/ under the folder. Writes comparison.md, comparison.json, comparison.png and,
for runs named sdpg_beta_VALUE, beta.png to DIR, by default the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdpg_megatron.observe.summary import SUMMARY_FILE
from sdpg_megatron.observe.writers import METRICS_FILE, read_metrics

BETA = "sdpg_beta_"
"""Name prefix of the runs of the beta sweep."""
CURVES = (
    ("reward/mean", "reward of the step's samples"),
    ("eval/sampled_accuracy", "held-out accuracy, sampled"),
    ("eval/greedy_accuracy", "held-out accuracy, greedy"),
    ("train/entropy", "entropy of the policy, nats a token"),
    ("rollout/length", "response length, tokens"),
    ("distill/kl", "KL or other divergence to the teacher, nats a token"),
)
COLUMNS = {
    "held-out, sampled": ("eval/sampled_accuracy", 1),
    "held-out, greedy": ("eval/greedy_accuracy", 1),
    "reward, last 2 steps": ("reward/mean", 2),
    "reward, all steps": ("reward/mean", None),
    "entropy": ("train/entropy", 2),
    "length": ("rollout/length", 2),
    "divergence": ("distill/kl", 2),
    "prompts asked a step": ("selection/prompts", None),
}
"""Column -> metric, and number of last values to average; None for all."""


class ReportError(Exception):
    """No finished run."""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    seed: int
    records: Sequence[Mapping[str, float]]

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Step and value of each record with the metric."""
        return [(int(record["step"]), record[metric]) for record in self.records if metric in record]

    def value(self, metric: str, last: int | None) -> float | None:
        """Mean of the last values of the metric; None if the run has none."""
        values = [value for _, value in self.points(metric)]
        return fmean(values[-last:] if last else values) if values else None


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, minimum and maximum of a number over runs."""

    mean: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 1 if self.mean >= 10 else 3
        if self.minimum == self.maximum:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.minimum:.{digits}f} to {self.maximum:.{digits}f})"


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """Read the finished runs by name, ordered by seed.

    Raises:
        ReportError: no finished run.
    """
    runs: dict[str, list[Run]] = {}
    for summary in folder.glob(f"*/seed_*/{SUMMARY_FILE}"):
        run = Run(int(summary.parent.name.removeprefix("seed_")), read_metrics(summary.with_name(METRICS_FILE)))
        runs.setdefault(summary.parents[1].name, []).append(run)
    if not runs:
        raise ReportError(f"{folder}: found no NAME/seed_N/{SUMMARY_FILE}, expected finished runs of a comparison")
    return {name: sorted(runs[name], key=lambda run: run.seed) for name in sorted(runs)}


def spreads(runs: Sequence[Run]) -> dict[str, Spread]:
    """Spread of each column over the runs that have it."""
    found = {name: [run.value(*column) for run in runs] for name, column in COLUMNS.items()}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: Spread.of(values) for name, values in known.items() if values}


def table(runs: Mapping[str, Sequence[Run]]) -> str:
    """Markdown table with one row per name."""
    rows = [["run", "seeds", *COLUMNS], ["---"] * (len(COLUMNS) + 2)]
    for name, some in runs.items():
        numbers = spreads(some)
        rows.append([name, str(len(some)), *(str(numbers.get(column, "-")) for column in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def numbers(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Numbers of every run, by name, seed and column."""
    return {
        name: {str(run.seed): {column: run.value(*source) for column, source in COLUMNS.items()} for run in some}
        for name, some in runs.items()
    }


def plot(runs: Mapping[str, Sequence[Run]], target: Path, title: str) -> None:
    """Plot each metric over steps: the mean over seeds as a line, minimum to maximum as a band."""
    figure = Figure(figsize=(12, 11), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(3, 2).flat, CURVES, strict=True):
        axes.set_title(label)
        for number, (name, some) in enumerate(runs.items()):
            draw(axes, [run.points(metric) for run in some], name, f"C{number}")
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(target, dpi=100)


def draw(axes: Axes, curves: Sequence[Sequence[tuple[int, float]]], label: str, color: str) -> None:
    """Draw the curves of one name over all steps with a value."""
    by_step: dict[int, list[float]] = {}
    for step, value in (point for curve in curves for point in curve):
        by_step.setdefault(step, []).append(value)
    spread = {step: Spread.of(by_step[step]) for step in sorted(by_step)}
    axes.plot(list(spread), [found.mean for found in spread.values()], label=label, color=color, linewidth=1.6)
    low, high = [found.minimum for found in spread.values()], [found.maximum for found in spread.values()]
    axes.fill_between(list(spread), low, high, color=color, alpha=0.12, linewidth=0)


def report(folder: Path, out: Path) -> str:
    """Write tables, numbers and plots; return the tables.

    Raises:
        ReportError: no finished run.
    """
    runs = read_runs(folder)
    sweep = {name: some for name, some in runs.items() if name.startswith(BETA)}
    methods = {name: some for name, some in runs.items() if name not in sweep}
    out.mkdir(parents=True, exist_ok=True)
    tables = []
    for some, picture, title in (
        (methods, "comparison.png", "Methods: mean over seeds, and the band from minimum to maximum"),
        (sweep, "beta.png", "SDPG with different beta"),
    ):
        if some:
            tables.append(table(some))
            plot(some, out / picture, title)
    (out / "comparison.json").write_text(json.dumps(numbers(runs), indent=1) + "\n", encoding="utf-8")
    (out / "comparison.md").write_text("\n".join(tables), encoding="utf-8")
    return "\n".join(tables)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/report_comparison.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="runs/compare")
    parser.add_argument("--out", type=Path, help="output folder (default: the same)")
    options = parser.parse_args(argv)
    try:
        sys.stdout.write(report(options.folder, options.out or options.folder))
    except ReportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
