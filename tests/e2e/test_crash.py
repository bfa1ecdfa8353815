"""Runs that are killed without warning, in training and inside a save: they go on as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks.crash import Death, Runner
from sdpg_megatron.checkpoint.files import find_damage
from sdpg_megatron.checkpoint.state import MANIFEST, RunState, complete_checkpoints
from tests.e2e.dying import MOMENTS, VARIABLE
from tests.e2e.runs import ROOT, contents, environment, metrics, train, weights, write_run

SETTINGS = {"steps": 6, "checkpoint": {"every": 1, "keep": 2}, "eval": {"every": 3, "samples": 2}}
ASYNCHRONOUS = "true", "false"
LIMIT = 300.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(write_run(folder, **SETTINGS))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def records(run: Path, name: str) -> list[int]:
    """The step of each line, as they stand in the file."""
    return [json.loads(line)["step"] for line in (run / name).read_text().splitlines()]


def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Once at each moment (without --all at four of them), in a seeded order, at the first or second time that it
    comes; saving behind the steps and not in turns."""
    draw = random.Random("crash")
    moments = draw.sample(list(MOMENTS), len(MOMENTS) if request.config.getoption("--all") else 4)
    config, run = write_run(tmp_path, **SETTINGS), tmp_path / "run"
    killed = 0
    for number, moment in enumerate(moments):
        monkeypatch.setenv(VARIABLE, f"{moment}:{draw.randint(1, 2)}")
        call = train(config, f"checkpoint.asynchronous={ASYNCHRONOUS[number % 2]}", program="tests.e2e.dying")
        if call.returncode == 0:
            break
        assert call.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), call.stderr[-3000:]
        killed += 1
        for checkpoint in complete_checkpoints(run / "checkpoints"):
            damage = find_damage(checkpoint, RunState.read(checkpoint / MANIFEST).files, digests=True)
            assert damage is None, moment
    assert killed >= len(moments) - 2
    done = train(config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(run) == metrics(whole)
    assert records(run, "metrics.jsonl") == records(whole, "metrics.jsonl")
    assert (run / "prompts.jsonl").read_text() == (whole / "prompts.jsonl").read_text()
    assert contents(run / "rollouts") == contents(whole / "rollouts")
    expected, found = weights(whole), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", "step_00000005", "step_00000006"]


def test_so_does_one_of_two_ranks_whatever_is_killed(tmp_path: Path) -> None:
    """The benchmark's machinery with few kills: this seed's take the launcher after a checkpoint, the second rank
    between two updates, and the launcher at some time."""
    out = tmp_path / "crash.json"
    line = [sys.executable, "benchmarks/crash.py", "--kills", "3", "--seed", "193", "--steps", "4", "--out", str(out)]
    done = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found.pop("resumes") >= 2
    assert found == {"kills": 3, "mismatches": 0, "lost": 0, "doubled": 0, "broken": 0}
    assert json.loads((tmp_path / "crash.json.meta.json").read_text())["of"].keys() == {"launcher", "rank"}


class Failing:
    """A launcher that ends with exit code 2, after a kill or without one."""

    exitcode = 2

    def __init__(self, *, args: tuple[str, object, object, str], **_: object) -> None:
        self.folder = Path(args[-1])
        self.killed = args[2] is not None

    def start(self) -> None:
        (self.folder / "rank0.log").write_text("ConfigError: steps")
        if self.killed:
            (self.folder / "struck").touch()

    def join(self, timeout: float) -> None: ...

    def is_alive(self) -> bool:
        return False


def test_a_start_that_fails_by_itself_is_no_kill(tmp_path: Path) -> None:
    runner = Runner(tmp_path, seed=0, steps=1)
    runner.context = SimpleNamespace(Process=Failing)  # type: ignore[assignment]
    (tmp_path / "run").mkdir()
    config = tmp_path / "run" / "run.yaml"
    assert runner._start(config, (), Death(False, 0, "update", 1, 0.0))
    with pytest.raises(RuntimeError, match=r"exit code 2 without a kill; (?s:.*)\[rank0\] ConfigError: steps"):
        runner._start(config, (), None)


def ranks_of(config: Path) -> list[psutil.Process]:
    """The living processes of a run that are not its launcher."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(config) in line and "torch.distributed.run" not in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for_step(run: Path, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT
    while not (run / "prompts.jsonl").exists() or not (run / "prompts.jsonl").read_text():
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    """Or the run that is started next would have company."""
    config = write_run(tmp_path, **{**SETTINGS, "steps": 1000})
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", "sdpg_megatron", "train", str(config), "parallel.pipeline=2"]
    with subprocess.Popen(line, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL) as launcher:
        try:
            wait_for_step(tmp_path / "run", launcher)
            assert len(ranks_of(config)) >= 2
        finally:  # leaving the block waits for its end
            launcher.kill()
    deadline = time.monotonic() + LIMIT
    while ranks_of(config):
        assert time.monotonic() < deadline
        time.sleep(0.1)
