"""Ranks and a real server on two hosts: what is published crosses the network between them, which may fail."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from tests.e2e.machines import Machines
from tests.e2e.runs import metrics, write_run
from tests.sglang.conftest import CPU_ARGUMENTS

RATE = 500_000
"""Bits a second of a slow link: the model takes seconds to publish."""
LOST_SECONDS = 10
UPDATE_SECONDS = 5
"""Of `rollout.sglang.update_timeout`, where a publish is to be given up before the machines give each other up."""


def arguments(model: Path) -> list[str]:
    served = f"rollout.sglang.arguments={json.dumps(CPU_ARGUMENTS)}"
    return [f"model.path={model}", served, "rollout.sglang.verify_every=1", "optimizer.schedule=constant"]


def start_with_a_machine_for_the_server(
    machines: Machines, model: Path, folder: Path, *more: str, **variables: object
) -> list[subprocess.Popen[bytes]]:
    """One rank on the first host, and the server alone on the second: only rollouts and publishes cross the link."""
    config = write_run(folder, steps=6)
    overrides = [*arguments(model), "parallel.pipeline=1", "checkpoint.every=0", *more]
    return machines.launch(config, *overrides, servers=(0, 1), ROLLOUT_NODES=1, **variables)


def cut_in_a_publish(machines: Machines, launchers: list[subprocess.Popen[bytes]], model: Path, run: Path) -> None:
    """Cut the link when it is slow and, since the last step's end, a third of the model has crossed it."""
    machines.until(lambda: (run / "metrics.jsonl").exists() and bool(metrics(run)), launchers)
    machines.link.slow(RATE)
    part = (model / "model.safetensors").stat().st_size // 3
    sent_at: dict[int, int] = {}  # by the steps done then

    def amid() -> bool:
        sent = machines.hosts[0].sent()
        return sent - sent_at.setdefault(len(metrics(run)), sent) > part

    machines.until(amid, launchers)
    machines.link.cut()
    assert len(metrics(run)) == max(sent_at), "a step's end is not in the middle of a publish"


def test_a_server_on_the_second_host_gets_the_weights_of_every_step(
    machines: Machines, model: Path, tmp_path: Path
) -> None:
    """Its log-probs are the trainer's after each publish, and it ends with the run."""
    config, run = write_run(tmp_path, steps=2), tmp_path / "run"
    launchers = machines.launch(config, *arguments(model), servers=(0, 1))
    assert machines.codes(launchers) == [0, 0], machines.said(0) + machines.said(1)
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert all(line["rollout/logprob_diff_max"] < 1e-3 for line in metrics(run))
    assert machines.hosts[1].address in (run / "logs" / "sglang-1-0.log").read_text()


def test_a_publish_that_a_cut_link_breaks_is_given_up_and_made_again(
    machines: Machines, model: Path, tmp_path: Path
) -> None:
    """On a slow link, which is cut for longer than a publish may take: no step is lost, or made with other weights."""
    run = tmp_path / "run"
    bounds = [f"rollout.sglang.update_timeout={UPDATE_SECONDS}"]
    launchers = start_with_a_machine_for_the_server(machines, model, tmp_path, *bounds)
    cut_in_a_publish(machines, launchers, model, run)
    time.sleep(2 * UPDATE_SECONDS)
    machines.link.mend()
    machines.link.fast()
    assert machines.codes(launchers) == [0, 0], machines.said(0) + machines.said(1)
    said = "".join(path.read_text() for path in run.glob("logs/node-0/*/attempt_0/0/stderr.log"))
    assert "did not get the weights" in said
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert all(line["rollout/logprob_diff_max"] < 1e-3 for line in metrics(run))


def test_a_link_that_is_cut_for_good_in_a_publish_ends_the_run_and_the_server(
    machines: Machines, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launchers = start_with_a_machine_for_the_server(machines, model, tmp_path, LOST_SECONDS=LOST_SECONDS)
    cut_in_a_publish(machines, launchers, model, run)
    assert machines.codes(launchers, limit=LOST_SECONDS + 60) == [1, 1]
    assert machines.gave_each_other_up(), machines.said(0) + machines.said(1)
    assert not (run / "summary.json").exists()
