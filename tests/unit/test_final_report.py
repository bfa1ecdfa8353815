"""What a finished run prints: files that are there, and commands that the shell finds."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config.load import parse
from sdpg_megatron.observe.summary import Summary
from sdpg_megatron.train.final_report import describe_run, program

NUMBERS: dict[str, Any] = {"accuracy_before": 0.05, "accuracy_after": 0.6, "greedy_before": 0.4, "greedy_after": 0.8}
NO_NUMBERS: dict[str, Any] = dict.fromkeys(NUMBERS)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment with the script, in the working directory and not on PATH."""
    folder = tmp_path / "my venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "sdpg-megatron"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_script_is_called_as_the_shell_finds_it(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program() == "'my venv/bin/sdpg-megatron'"
    monkeypatch.chdir("/usr")
    assert shlex.split(program()) == [str(environment / "sdpg-megatron")]
    monkeypatch.setenv("PATH", f"/usr/bin:{environment}")
    assert program() == "sdpg-megatron"
    other = environment.parent / "other"
    other.mkdir()
    (other / "sdpg-megatron").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{other}:{environment}")
    assert program() != "sdpg-megatron", "that is another environment's"
    (environment / "sdpg-megatron").unlink()
    assert shlex.split(program()) == [str(environment / "python"), "-m", "sdpg_megatron"]


def report(run: Path, *, exported: bool, files: bool, evaluations: int, numbers: dict[str, Any]) -> list[str]:
    for step in range(evaluations):
        (run / "eval" / f"step_{step:08d}").mkdir(parents=True)
        (run / "eval" / f"step_{step:08d}" / "summary.json").touch()
    for name in ("checkpoints", *(("model",) if exported else ())):
        (run / name).mkdir(parents=True)
    tree = {"run_dir": str(run), "steps": 12, "model": {"path": "m"}, "data": {"eval": ["e.jsonl"] if files else []}}
    summary = Summary(**numbers, reward=0.5 if files else None, steps=12, seconds=257.2)
    return describe_run(parse({**tree, "optimizer": {"warmup_steps": 0}}), summary).splitlines()


def test_it_names_what_is_there(environment: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    first, *rest = report(run, exported=True, files=True, evaluations=3, numbers=NUMBERS)
    wanted = "done: 12 steps in 4:17, reward 0.500 in the last one, accuracy 0.050 -> 0.600, greedy 0.400 -> 0.800"
    assert first == wanted
    assert [line.split()[0] for line in rest[1:4]] == ["model/", "eval/", "checkpoints/"]
    assert [shlex.split(line)[1:] for line in rest[5:8]] == [
        ["eval", str(run), "--out", f"{run}-eval"],
        ["compare", str(run / "eval" / "step_00000000"), str(run / "eval" / "step_00000002")],
        ["convert", str(run / "model"), f"{run}-megatron"],
    ]
    assert f"'{environment}/python' -m sglang.launch_server --model-path" in rest[-1]


@pytest.mark.parametrize("held_out", [0, 3])
def test_a_run_on_reasoning_gym_is_evaluated_on_its_held_out_problems(
    environment: Path, tmp_path: Path, held_out: int
) -> None:
    data = {"reasoning_gym": {"tasks": {"gcd": {}}, "held_out": held_out}}
    rollout = {"sglang": {"python": "/opt/my python"}}
    (tmp_path / "run" / "model").mkdir(parents=True)
    tree = {"run_dir": str(tmp_path / "run"), "steps": 12, "model": {"path": "m"}, "data": data, "rollout": rollout}
    config = parse({**tree, "optimizer": {"warmup_steps": 0}, "eval": {"every": 0}})
    commands = describe_run(config, Summary(**NO_NUMBERS, steps=12, seconds=1.0)).partition("next:\n")[2]
    expected = ["eval", str(tmp_path / "run"), "--out", f"{tmp_path / 'run'}-eval"]
    assert (expected in [shlex.split(line)[1:] for line in commands.splitlines()]) == (held_out > 0)
    assert "'/opt/my python' -m sglang.launch_server" in commands


def test_without_evaluations_and_export_it_says_less(environment: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, *rest = report(run, exported=False, files=False, evaluations=0, numbers=NO_NUMBERS)
    assert first == "done: 12 steps in 4:17"
    assert [shlex.split(line)[1:] for line in rest[3:]] == [
        ["eval", str(run), "--out", f"{run}-eval", "data.eval=[FILE.jsonl]"],
        ["convert", str(run), f"{run}-hf"],
    ]
