"""Runs whose ranks are on two hosts, each with its own launcher and a network between them that fails."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.e2e.hosts import BURST, Meter
from tests.e2e.machines import Machines
from tests.e2e.runs import metrics, write_run

LOST_SECONDS = 10
RATE = 3_000_000
"""Bits a second of a slow link; at full speed publishes and passes reach several times as much."""


def steps(run: Path) -> list[float]:
    return [line["step"] for line in metrics(run)] if (run / "metrics.jsonl").exists() else []


def test_a_run_over_a_slow_link_that_is_stopped_and_then_cut_for_a_moment(machines: Machines, tmp_path: Path) -> None:
    """Half of the model is on each host: every step's activations, gradients and new weights cross the link."""
    config, run = write_run(tmp_path), tmp_path / "run"
    machines.link.slow(RATE)
    meters = [Meter(host) for host in machines.hosts]

    def stepped() -> bool:
        for meter in meters:
            meter.look()
        return 1 in steps(run)

    launchers = machines.launch(config)
    machines.until(stepped, launchers)
    assert all(meter.highest(1.0) < 1.05 * RATE + 8 * BURST for meter in meters), "no second has more than the rate"
    assert all(count > 0 for count in machines.link.held_back()), "and some had more to send"
    launchers[1].send_signal(signal.SIGTERM)
    assert machines.codes(launchers) == [75, 75], machines.said(0) + machines.said(1)
    assert "the same command continues" in machines.said(0)
    assert steps(run)[-1] < 4

    machines.link.fast()
    launchers = machines.launch(config)
    machines.until(lambda: "continuing after step" in machines.said(0), launchers)
    machines.link.cut()
    time.sleep(1.5)
    machines.link.mend()
    assert machines.codes(launchers) == [0, 0], machines.said(0) + machines.said(1)
    assert steps(run) == [1, 2, 3, 4]
    assert all(line["rollout/logprob_diff_max"] < 1e-4 for line in metrics(run)), "published is what is trained"
    assert (run / "model" / "model.safetensors").exists()
    logs = sorted(path.parent.parent.parent.parent.name for path in run.glob("logs/*/*/attempt_0/0/stderr.log"))
    assert logs == ["node-0", "node-0", "node-1", "node-1"]


def test_a_link_that_is_cut_for_good_ends_the_run_on_both_sides(machines: Machines, tmp_path: Path) -> None:
    config, run = write_run(tmp_path, steps=1000), tmp_path / "run"
    launchers = machines.launch(config, LOST_SECONDS=LOST_SECONDS)
    machines.until(lambda: 1 in steps(run), launchers)
    machines.link.cut()
    cut = time.monotonic()
    assert machines.codes(launchers, limit=LOST_SECONDS + 60) == [1, 1]
    assert time.monotonic() - cut > LOST_SECONDS / 2
    assert machines.gave_each_other_up(), machines.said(0) + machines.said(1)
    assert not (run / "summary.json").exists()
