"""A run from the command line: what it leaves, how it is interrupted and continued, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpg_megatron.checkpoint.state import complete_checkpoints, step_of
from sdpg_megatron.cli import _parser, main
from sdpg_megatron.observe.writers import read_metrics
from tests.e2e.runs import (
    LIMIT,
    ROOT,
    command,
    contents,
    environment,
    metrics,
    preloaded,
    rank_environments,
    train,
    weights,
    write_run,
)
from tests.e2e.stopping import VARIABLE
from tests.e2e.stopping_at import VARIABLE as STOP_AT


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(write_run(folder))
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


@pytest.fixture
def said(whole: Path) -> str:
    """What the run printed."""
    return (whole / "said").read_text()


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    run = whole / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() == {
        "accuracy_before", "accuracy_after", "greedy_before", "greedy_after", "reward", "steps", "seconds"
    }  # fmt: skip
    assert summary["steps"] == 4
    assert summary["seconds"] > 0
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "config.yaml").exists()
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3, 4]


def test_the_final_report_has_numbers_files_and_commands_that_work(said: str, whole: Path) -> None:
    """The commands are parsed by the program that they call."""
    run = whole / "run"
    summary = json.loads((run / "summary.json").read_text())
    _, _, words = said.partition(" done: ")
    first, *rest = words.splitlines()
    reward = metrics(run)[-1]["reward/mean"]
    assert summary["reward"] == reward
    assert first.startswith("4 steps in 0:") and f"reward {reward:.3f} in the last one" in first
    assert f"accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}" in first
    listed = [line.split()[0] for line in rest[1 : rest.index("next:")]]
    assert rest[0] == f"{run}:"
    assert all((run / name).exists() for name in listed)
    assert {"model/", "metrics.jsonl", "rollouts/", "eval/", "checkpoints/"} <= set(listed)
    *calls, server = [shlex.split(line) for line in rest[rest.index("next:") + 1 :]]
    arguments = [[word for word in words if word not in ("-m", "sdpg_megatron")][1:] for words in calls]
    assert [words[0] for words in arguments] == ["eval", "compare", "convert"]
    for words in arguments:
        _parser().parse_args(words)
    assert main(arguments[1]) == 0
    assert server[server.index("--model-path") + 1] == str(run / "model")


def test_evaluation_time_is_that_of_its_step(whole: Path) -> None:
    records = read_metrics(whole / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "time/eval" in record] == [0, 2, 4]
    assert all(record["time/rollout"] < record["time/step"] for record in records[1:])


def test_rows_and_messages_have_the_time(said: str) -> None:
    stamped = [line for line in said.splitlines() if re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert [row.split()[2] for row in stamped[1:-1]] == ["0/4", "1/4", "2/4", "3/4", "4/4"]


def test_a_run_leaves_responses_to_read(whole: Path) -> None:
    files = sorted((whole / "run" / "rollouts").iterdir())
    assert [path.name for path in files] == [f"step_{step:08d}.jsonl" for step in (1, 2, 3, 4)]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(rows) == 16
    asked = json.loads((whole / "run" / "prompts.jsonl").read_text().splitlines()[1])["prompts"]
    assert list(dict.fromkeys(row["prompt"] for row in rows)) == asked
    assert all(row["reward"] == any(map(str.isdigit, row["response"])) for row in rows)
    assert all(row["question"].startswith("What is") and row["answer"].isdigit() for row in rows)
    mean = sum(row["reward"] for row in rows) / len(rows)
    assert mean == pytest.approx(metrics(whole / "run")[2]["reward/mean"])
    problem = json.loads((whole / "run" / "eval" / "step_00000004" / "eval.jsonl").read_text().splitlines()[0])
    assert (problem["question"], problem["reference_answer"]) == ("What is 9 + 9?", "18")
    assert len(problem["sampled"]["responses"]) == 2


def test_training_and_rollout_agree_about_the_first_tokens(whole: Path) -> None:
    first = metrics(whole / "run")[1]
    assert first["rollout/logprob_diff_max"] < 1e-4
    assert first["distill/kl"] > 0
    assert first["reference/kl"] >= 0


def test_a_rollout_engine_that_is_too_far_off_stops_the_run(tmp_path: Path) -> None:
    """No two ways to compute a log-prob are closer than this limit."""
    stopped = train(write_run(tmp_path), "rollout.mismatch_limit=1.0e-12")
    assert stopped.returncode == 2
    assert "step 0: found a mean |log-prob in training - log-prob in rollout| of" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0]
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_a_verifier_that_always_fails_ends_the_run_at_its_first_step(tmp_path: Path) -> None:
    """On every rank, with the first failure; the sample call at the start warns of it before."""
    broken = ["reward.verifier=tests.e2e.verifier:broken", "data.eval=[]", "eval.every=0", "parallel.pipeline=2"]
    ended = train(write_run(tmp_path), *broken, ranks=2)
    assert ended.returncode == 2
    assert (
        "VerifierError: reward.verifier: step 1: found 16 of 16 calls that failed, the first on train" in ended.stderr
    )
    assert re.search(r"KeyError: 'no such key' \(\S+tests/e2e/verifier.py:\d+\); expected at most 50%", ended.stderr)
    logged = r"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d+ WARNING \S+: reward\.verifier \S+ failed on the response '"
    assert re.search(logged, ended.stderr, re.MULTILINE)
    assert "Traceback" not in ended.stderr
    assert metrics(tmp_path / "run") == []


def test_the_exported_model_is_the_trained_one(whole: Path) -> None:
    trained, start = whole / "run" / "model", whole / "hf"
    model = AutoModelForCausalLM.from_pretrained(trained)
    before = dict(AutoModelForCausalLM.from_pretrained(start).named_parameters())
    assert AutoTokenizer.from_pretrained(trained).chat_template
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_second_call_says_that_the_run_is_done(whole: Path) -> None:
    before = (whole / "run" / "metrics.jsonl").read_bytes()
    again = train(whole / "run.yaml")
    assert again.returncode == 0
    assert "done already" in again.stdout
    assert (whole / "run" / "metrics.jsonl").read_bytes() == before


def test_an_interrupted_run_continues_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run = tmp_path / "run"
    process = subprocess.Popen(command([config]), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    deadline = time.monotonic() + 120
    for line in process.stdout:  # the row of step 1: the next steps are under way
        assert time.monotonic() < deadline
        if "1/4" in line.split():
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75, rest
    assert "the same command continues" in rest
    assert not (run / "summary.json").exists()

    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "reward/mean": 1.0}\n{"step"')  # a line beyond the checkpoint, and half a line
    continued = train(config)
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step" in continued.stdout
    assert metrics(run) == metrics(whole / "run")
    assert contents(run / "rollouts") == contents(whole / "run" / "rollouts")
    expected, found = weights(whole / "run"), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_is_stopped_while_it_reads_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOP_AT, "read:0")
    stopped = train(write_run(tmp_path), program="tests.e2e.stopping_at")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_run_outlives_its_terminal(tmp_path: Path) -> None:
    """The terminal is closed while the run prints to it, also what it writes to standard error; SIGHUP comes."""
    line = command([write_run(tmp_path, steps=2, eval={"every": 0, "samples": 1}, checkpoint={"export": False})])
    ours, theirs = os.openpty()

    def in_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    files: dict[str, int] = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = subprocess.Popen(
        line, env=environment(), cwd=ROOT, start_new_session=True, preexec_fn=in_terminal, **files
    )  # type: ignore[call-overload]
    os.close(theirs)
    shown = b""
    while b" 0/2" not in shown:
        shown += os.read(ours, 1 << 16)
    os.close(ours)
    log = tmp_path / "run" / "log.txt"
    assert process.wait(timeout=120) == 0, log.read_text()
    told = log.read_text()
    assert told.count("standard output is lost (Input/output error)") == 1
    assert told.count("standard error is lost") == 1
    assert "standard error is lost" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\dT\S+ INFO  2/2 .*\n.* INFO done: 2 steps", told, re.MULTILINE), told
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2]


STOPS = [("2:SIGTERM", 0), ("4:SIGINT", 1), ("3:SIGINT", 2), ("3:SIGTERM", 2), ("5:SIGTERM", 4)]
"""The generation of a call in which it is to stop, by which signal, and the newest checkpoint then. A step has one
generation, an evaluation two: the signal comes in the first evaluation, in steps 2 and 3, and in the evaluations after
steps 2 and 4."""


def test_a_generation_is_abandoned_when_the_run_is_to_stop(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, and in an evaluation before, between and after the steps; each time the run goes on from there."""
    config, run = write_run(tmp_path), tmp_path / "run"
    for when, newest in STOPS:
        monkeypatch.setenv(VARIABLE, when)
        stopped = train(config, program="tests.e2e.stopping")
        assert stopped.returncode == 75, stopped.stderr[-3000:]
        assert f"stopped after step {newest}" in stopped.stdout
        found = [step_of(path) for path in complete_checkpoints(run / "checkpoints")]
        assert max(found, default=0) == newest
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert metrics(run) == metrics(whole / "run")
    assert (run / "prompts.jsonl").read_text() == (whole / "run" / "prompts.jsonl").read_text()
    assert contents(run / "rollouts") == contents(whole / "run" / "rollouts")
    expected, after = weights(whole / "run"), weights(run)
    assert all(torch.equal(expected[name], after[name]) for name in expected)


def test_other_prompts_in_the_same_file_do_not_continue_a_run(whole: Path) -> None:
    data = whole / "train.jsonl"
    before = data.read_text()
    data.write_text(before.replace("1", "2"))
    try:
        refused = train(whole / "run.yaml")
    finally:
        data.write_text(before)
    assert refused.returncode == 2
    assert re.search(
        r"ConfigError: data: found '\w{16}', expected the prompts that the run was started", refused.stderr
    )


def test_a_dry_run_reads_everything_and_trains_nothing(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    checked = train(config, "--dry-run", "objective.beta=0.25")
    assert checked.returncode == 0, checked.stderr
    assert "beta: 0.25" in checked.stdout
    assert "stage 0: " in checked.stderr and "forward and back: " in checked.stderr  # the model was walked
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor=3", "parallel.tensor: found 3"),
        ("parallel.pipeline=5", "parallel.pipeline: found 5"),
        ("objective.betta=1", "did you mean 'beta"),
        ("rollout.group_size=1", "rollout.group_size"),
        ("objective.beta_decay_steps=99", "beta_decay_steps: found 99"),
        ("model.path=nowhere", "model.path"),
        ("data.train=[nowhere.jsonl]", "nowhere.jsonl"),
        ("data.train=[]", "data.train: found [], expected at least one file"),
        ("data.eval=[]", "eval.every: found 2, expected 0 without data.eval. Fix: set data.eval, or remove it"),
        ("reward.verifier=tests.e2e.verifier:has_digits", "has_digit"),
        ("parallel.tensor=2", "number of ranks"),
        ("run_dir=/dev/null/run", "run_dir: found '/dev/null/run (Not a directory)', expected a folder that a run can"),
        ("parallel.context=2", "parallel.tensor x parallel.context"),
    ],
)
def test_mistakes_are_named_in_one_line(
    tmp_path: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_run(tmp_path)), override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, command: str) -> None:
    line = [command, str(write_run(tmp_path)), "parallel.rendezvous_timeout=1"]
    line += ["--out", str(tmp_path / "out")] if command == "eval" else []
    alone = preloaded().run("sdpg_megatron", line, rank_environments(2)[:1], LIMIT)
    assert alone.returncode == 2
    assert re.fullmatch(
        r"LaunchError: rendezvous: found rank 0 \(process .* after 1 s, expected rank 1 of 2 .*\n", alone.stderr
    )


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.pipeline=2"]),
        (2, []),
        (2, ["parallel.context=2", "optimizer.micro_batch_tokens=200"]),
        (4, ["parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true"]),
    ],
    ids=["pp2", "dp2", "cp2", "tp2_pp2_sp"],
)
def test_on_several_ranks(tmp_path: Path, whole: Path, ranks: int, layout: list[str]) -> None:
    config = write_run(tmp_path)
    settings = ["steps=2", "optimizer.schedule=constant", "objective.correction=truncate"]
    done = train(config, *layout, *settings, ranks=ranks)
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert lines[1]["rollout/correction"] == pytest.approx(1, abs=1e-4)
    assert lines[1]["rollout/effective_sample_size"] == pytest.approx(1, abs=1e-4)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["rollout/logprob_diff_max"] < 1e-4  # what was published is what is trained, on any layout
    if "parallel.pipeline=2" in layout:
        # One replica draws as a single process does, so even its first step is the same.
        assert lines[1]["distill/kl"] == pytest.approx(metrics(whole / "run")[1]["distill/kl"], rel=1e-3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
