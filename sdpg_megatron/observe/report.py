"""Plot of a run's learning curve."""

from __future__ import annotations

import io
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdpg_megatron.observe.files import write_whole
from sdpg_megatron.observe.writers import METRICS_FILE, read_metrics

CURVE_FILE = "learning_curve.png"
REWARD, SAMPLED, GREEDY, KL, ENTROPY = "tab:gray", "tab:blue", "tab:orange", "tab:purple", "tab:green"


def plot_learning_curve(run_dir: Path) -> Path:
    """Plot reward, held-out accuracy, KL and entropy over steps from metrics.jsonl; returns the picture's path.

    Needs no display: the figure is drawn by matplotlib's Agg backend.

    Raises:
        FileNotFoundError: the run has no metrics.jsonl.
        DataError: a line of it is not a record.
        WriteError: the picture could not be written.
    """
    records = read_metrics(run_dir / METRICS_FILE)
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))

    accuracy = figure.add_subplot(grid[0, :])
    accuracy.set_title("Reward in training and accuracy on held-out problems")
    _draw(accuracy, records, "reward/mean", "reward of the step's samples", REWARD)
    _draw(accuracy, records, "eval/sampled_accuracy", "held-out, sampled", SAMPLED, marker="o")
    _draw(accuracy, records, "eval/greedy_accuracy", "held-out, greedy", GREEDY, marker="s")
    accuracy.set_ylabel("share right")
    accuracy.set_ylim(bottom=min(0.0, accuracy.get_ylim()[0]))
    if accuracy.lines:
        accuracy.legend(loc="best")

    divergence = figure.add_subplot(grid[1, 0], sharex=accuracy)
    divergence.set_title("KL to the privileged teacher")
    _draw(divergence, records, "distill/kl", "KL", KL)
    divergence.set_ylabel("nats per token")

    entropy = figure.add_subplot(grid[1, 1], sharex=accuracy)
    entropy.set_title("Entropy of the policy")
    _draw(entropy, records, "train/entropy", "entropy", ENTROPY)
    entropy.set_ylabel("nats per token")

    for axes in figure.axes:
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    return write_whole(run_dir / CURVE_FILE, picture.getvalue())


def _draw(axes: Axes, records: list[dict[str, float]], name: str, label: str, color: str, marker: str = "") -> None:
    """Plot one metric over the steps that have it; non-finite values leave gaps."""
    points = [(record["step"], record[name]) for record in records if name in record]
    if any(math.isfinite(value) for _, value in points):
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, linewidth=1.8)
