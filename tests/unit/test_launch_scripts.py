"""The shell scripts that start launchers: what they hand on, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ "$1" != -c ]]; then echo "$*"; fi
"""
FAKE_NVIDIA_SMI = """#!/usr/bin/env bash
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5f1e)"
echo "  MIG 3g.40gb     Device  0: (UUID: MIG-0a)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-77b2)"
"""
FAILING_NVIDIA_SMI = """#!/usr/bin/env bash
echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
exit 9
"""


def script(name: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment = {**kept, "PYTHON": sys.executable, **{key: str(value) for key, value in variables.items()}}
    line = ["bash", str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


def programs(folder: Path, **texts: str) -> str:
    """PATH with programs that hide those of the same name."""
    for name, text in texts.items():
        path = folder / name.replace("_", "-")
        path.write_text(text)
        path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_launcher_asks_for_what_it_cannot_know(tmp_path: Path) -> None:
    assert "NODE_RANK is not set" in script("launch.sh", "x.yaml", NNODES=2).stderr
    assert "MASTER_ADDR is not set" in script("launch.sh", "x.yaml", NNODES=2, NODE_RANK=0).stderr
    missing = script("launch.sh", tmp_path / "x.yaml")
    assert missing.returncode == 2
    assert "expected a readable YAML file" in missing.stderr


@pytest.fixture
def launcher(tmp_path: Path) -> Mapping[str, str]:
    """Variables with which launch.sh says what it would start, on a machine of two GPUs."""
    path = programs(tmp_path, python=FAKE_PYTHON, nvidia_smi=FAKE_NVIDIA_SMI)
    return {"PATH": path, "PYTHON": str(tmp_path / "python"), "MASTER_ADDR": "10.0.0.1"}


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [(None, 2), ("0", 1), ("2, 5,7", 3), ("GPU-5f1e,MIG-0a", 2), ("0,-1,1", 1), ("", 1), ("NoDevFiles", 1)],
)
def test_the_default_number_of_ranks_is_that_of_visible_gpus(
    launcher: Mapping[str, str], visible: str | None, ranks: int
) -> None:
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = script("launch.sh", "my.yaml", **launcher, **chosen)
    assert f"--ranks {ranks} --servers 0" in done.stdout, done.stderr


def test_what_nvidia_smi_says_when_it_fails_is_no_gpu(launcher: Mapping[str, str], tmp_path: Path) -> None:
    programs(tmp_path, nvidia_smi=FAILING_NVIDIA_SMI)
    assert "--ranks 1 --servers 2" in script("launch.sh", "my.yaml", **launcher, SERVERS_PER_NODE=2).stdout


def test_ranks_and_servers_on_one_machine_need_a_number_of_ranks(launcher: Mapping[str, str]) -> None:
    refused = script("launch.sh", "my.yaml", **launcher, SERVERS_PER_NODE=1)
    assert refused.returncode == 2
    assert "RANKS_PER_NODE is not set, and servers take some of this machine's 2 GPUs" in refused.stderr
    done = script("launch.sh", "my.yaml", **launcher, SERVERS_PER_NODE=1, RANKS_PER_NODE=1)
    assert "--ranks 1 --servers 1" in done.stdout


@pytest.mark.parametrize("given", ["2 3", "2,3", "3, 2"])
def test_machines_for_rollouts_have_servers_alone(launcher: Mapping[str, str], given: str) -> None:
    variables = {**launcher, "NNODES": 4, "ROLLOUT_NODES": given, "SERVERS_PER_NODE": 1}
    found = [script("launch.sh", "my.yaml", **variables, NODE_RANK=node).stdout for node in range(4)]
    counts = [line.split(" --ranks ")[1].split(" --address")[0] for line in found]
    assert counts == ["2 --servers 0", "2 --servers 0", "0 --servers 1", "0 --servers 1"]


@pytest.mark.parametrize(("given", "named"), [("2;3", "2;3"), ("2 4", "4"), ("1,-1", "-1"), ("one", "one")])
def test_what_is_no_machine_for_rollouts_is_refused(launcher: Mapping[str, str], given: str, named: str) -> None:
    done = script("launch.sh", "my.yaml", **launcher, NNODES=4, NODE_RANK=0, ROLLOUT_NODES=given)
    assert done.returncode == 2
    assert f"'{named}' is no machine. Fix: numbers from 0 to 3" in done.stderr


FAKE_SRUN = """#!/usr/bin/env bash
echo "srun NNODES=$NNODES MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT $*"
if [[ -n "$FAKE_FIRST" ]]; then echo "$FAKE_FIRST" >"$CODE_FILE"; fi
exit "$FAKE_CODE"
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf 'node7\\nnode8\\n'; else echo "scontrol $*"; fi
"""


@pytest.mark.parametrize(
    ("first", "code", "requeued"),
    [(0, 0, False), (75, 75, True), (1, 1, False), (1, 75, False), ("", 75, False), (75, 137, True)],
)
def test_a_slurm_job_that_stopped_goes_back_into_the_queue(
    tmp_path: Path, first: object, code: int, requeued: bool
) -> None:
    """With programs in the place of Slurm's that say how they were called. `first`: machine 0's own exit code."""
    job = {"SLURM_JOB_ID": 12, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": 96}
    left = tmp_path / "sdpg-12.code"
    left.write_text("75\n")  # by an earlier start that was killed
    path = programs(tmp_path, srun=FAKE_SRUN, scontrol=FAKE_SCONTROL)
    folders = {"ROOT": ROOT, "SLURM_SUBMIT_DIR": tmp_path, "PATH": path}
    done = script("slurm.sbatch", "my.yaml", "steps=3", **job, **folders, FAKE_FIRST=first, FAKE_CODE=code)
    assert done.returncode == code, done.stderr
    step = "--ntasks-per-node=1 --kill-on-bad-exit=0 --wait=600 --cpus-per-task=96"
    program = f"bash {ROOT}/scripts/launch.sh my.yaml steps=3"
    assert f"srun NNODES=2 MASTER_ADDR=node7 MASTER_PORT=10024 {step} {program}" in done.stdout
    assert ("scontrol requeue 12" in done.stdout) == requeued
    assert not left.exists()
