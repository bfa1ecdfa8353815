"""A dry run refuses what would end a run at its start or first step, and writes nothing."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdpg_megatron.cli import main
from sdpg_megatron.runtime.run_lock import LOCK_FILE
from tests.e2e.runs import write_run

WEIGHTS = "model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_it_writes_nothing_and_says_what_it_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run.parent)
    assert main(["train", str(run), "--dry-run", "objective.beta=0.25", "parallel.tensor=2"]) == 0
    assert files(run.parent) == before
    said = capsys.readouterr()
    assert "beta: 0.25" in said.out
    lines = said.err.splitlines()
    assert lines[0] == "a new run"
    assert lines[1] == "reward.verifier tests.e2e.verifier:has_digit gave 1 to the response '0' to train.jsonl:1"
    assert lines[2].startswith("stage 0: ") and "forward and back: " in lines[2]
    assert main(["eval", str(run), "--dry-run", "--out", str(run.parent / "out")]) == 0
    assert files(run.parent) == before
    assert "gave 1 to the response '18' to eval.jsonl:1" in capsys.readouterr().err


def cut_weights(folder: Path) -> None:
    path = folder / "hf" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def lose_tensor(folder: Path) -> None:
    tensors = load_file(folder / "hf" / WEIGHTS)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "hf" / WEIGHTS, {"format": "pt"})


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "hf" / WEIGHTS)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "hf" / WEIGHTS, {"format": "pt"})


def put_file(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "rollouts").write_text("")


def put_folder(folder: Path) -> None:
    (folder / "run" / "metrics.jsonl").mkdir(parents=True)


def put_lock(folder: Path) -> None:
    (folder / "run" / LOCK_FILE).mkdir(parents=True)


def nothing(folder: Path) -> None:
    pass


SGLANG = "rollout.engine=sglang"


@pytest.mark.parametrize(
    ("damage", "options", "said"),
    [
        (cut_weights, [], "model.safetensors"),
        (lose_tensor, [], "model.layers.0.mlp.up_proj.weight"),
        (put_nan, [], "model.norm.weight"),
        (put_file, [], "run_dir: found '.*with a file named rollouts"),
        (put_folder, [], "run_dir: found '.*with a folder named metrics.jsonl"),
        (put_lock, [], "run_dir: found '.*with a folder named .lock"),
        (nothing, ["model.spec=transformer_engine"], "model.spec: found 'transformer_engine'"),
        (nothing, ["run_dir=/dev/null/run"], "run_dir: found '/dev/null/run"),
        (nothing, ["--ranks", "3", "parallel.tensor=2"], "--ranks: found 3, expected a multiple of 2"),
        (nothing, ["reward.verifier=tests.e2e.verifier:gives_text"], "reward.verifier: found .*returned 'right'"),
        (nothing, [SGLANG, "rollout.sglang.python=/no/such/python"], "/no/such/python: the interpreter"),
        (nothing, [SGLANG, "rollout.sglang.python=true", "rollout.sglang.ports=[{port}]"], "port .* cannot be used"),
        (nothing, [SGLANG, "rollout.sglang.urls=[http://nowhere.invalid:1]"], "a host that this machine can resolve"),
        (nothing, ["--branch-from", "nowhere"], "--branch-from: found 'nowhere'"),
    ],
)
def test_what_would_fail_is_refused(
    damage: Callable[[Path], None], options: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run.parent)
    before = files(run.parent)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [option.format(port=taken.getsockname()[1]) for option in options]
        assert main(["train", str(run), "--dry-run", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(said, error), error
    assert files(run.parent) == before


@pytest.mark.parametrize(
    ("damage", "options", "said"),
    [
        (put_nan, [], "model.norm.weight"),
        (nothing, ["--out", "{folder}/run.yaml"], "run_dir: found"),
        (nothing, ["reward.verifier=tests.e2e.verifier:gives_text"], "reward.verifier"),
        (nothing, [SGLANG, "rollout.sglang.python=/no/such/python"], "/no/such/python: the interpreter"),
    ],
)
def test_an_evaluation_is_checked_likewise(
    damage: Callable[[Path], None], options: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run.parent)
    words = ["--out", str(run.parent / "out"), *(option.format(folder=run.parent) for option in options)]
    assert main(["eval", str(run), "--dry-run", *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (run.parent / "out").exists()


def test_a_verifier_that_fails_on_the_sample_is_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run), "--dry-run", "reward.verifier=tests.e2e.verifier:broken"]) == 0
    assert "failed on the response '0' to train.jsonl:1: KeyError: 'no such key' (" in capsys.readouterr().err


def test_a_folder_that_another_run_writes_to(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run.parent / "run").mkdir()
    code = (
        "import sys, pathlib; from sdpg_megatron.runtime.run_lock import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.parent / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        held = (run.parent / "run" / LOCK_FILE).read_bytes()
        assert main(["train", str(run), "--dry-run"]) == 2
        assert f"no other run writes to (process {holder.pid} on" in capsys.readouterr().err
        assert (run.parent / "run" / LOCK_FILE).read_bytes() == held
        holder.communicate("")
    assert main(["train", str(run), "--dry-run"]) == 0


def test_ranks_belong_to_a_dry_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run), "--ranks", "2"]) == 2
    assert "ConfigError: --ranks: found 2, expected none without --dry-run" in capsys.readouterr().err
