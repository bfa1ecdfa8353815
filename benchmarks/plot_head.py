"""Plot time and peak memory of a result of `head.py`.

    python benchmarks/plot_head.py benchmarks/results/head-cpu.json docs/images/head.png

The result's .meta.json must be in the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS, FLOOR = "tab:blue", "tab:gray", "tab:green"


def color(name: str) -> str:
    return OURS if name.startswith("ours/") else FLOOR if name == "matmul_floor" else OTHERS


def draw_bars(axes: Axes, results: Sequence[dict[str, Any]], key: str, scale: float, unit: str) -> None:
    """Draw one bar per contestant, the first on top, with its value at the end."""
    names = [result["name"] for result in results]
    values = [result[key] / scale for result in results]
    bars = axes.barh(range(len(names)), values, color=[color(name) for name in names])
    axes.bar_label(bars, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)


def plot(source: Path, target: Path) -> None:
    results = json.loads(source.read_text())
    results = [result for result in results if result["T"] == results[0]["T"]]  # without the results of --scaling
    meta = json.loads(source.with_name(source.name + ".meta.json").read_text())
    ranks = sorted({result["tp"] for result in results})
    figure = Figure(figsize=(10, 2.8 * len(ranks)), layout="constrained")
    grid = figure.subplots(len(ranks), 2, squeeze=False)
    for tp, (time_axes, memory_axes) in zip(ranks, grid, strict=True):
        of_tp = [result for result in results if result["tp"] == tp]
        draw_bars(time_axes, of_tp, "seconds", 1, f"seconds, TP {tp}")
        draw_bars(memory_axes, of_tp, "peak_bytes", 1 << 20, f"peak extra MiB a rank, TP {tp}")
        memory_axes.set_yticklabels([])
    shape = ", ".join(f"{key} {results[0][key]}" for key in ("T", "H", "V", "dtype"))
    figure.suptitle(f"Output head, forward and backward: {shape}\n{meta['machine']}; {meta['date']}", fontsize=10)
    figure.savefig(target, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/plot_head.py", description=__doc__)
    parser.add_argument("source", type=Path, help="--out of head.py, with its .meta.json in the same folder")
    parser.add_argument("target", type=Path, help="image to write")
    options = parser.parse_args(argv)
    plot(options.source, options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
