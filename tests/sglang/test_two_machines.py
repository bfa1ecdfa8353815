"""Ranks on two hosts and a real server on one of them: what is published crosses the network between them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.machines import two_machines
from tests.e2e.runs import metrics, write_run
from tests.sglang.conftest import CPU_ARGUMENTS


def test_a_server_on_the_second_host_gets_the_weights_of_every_step(model: Path, tmp_path: Path) -> None:
    """Its log-probs are the trainer's after each publish, and it ends with the run."""
    config, run = write_run(tmp_path, steps=2), tmp_path / "run"
    arguments = [f"model.path={model}", f"rollout.sglang.arguments={json.dumps(CPU_ARGUMENTS)}"]
    arguments += ["rollout.sglang.verify_every=1", "optimizer.schedule=constant"]
    with two_machines(tmp_path) as machines:
        launchers = machines.launch(config, *arguments, servers=(0, 1))
        assert machines.codes(launchers) == [0, 0], machines.said(0) + machines.said(1)
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert all(line["rollout/logprob_diff_max"] < 1e-3 for line in metrics(run))
    assert machines.hosts[1].address in (run / "logs" / "sglang-1-0.log").read_text()
