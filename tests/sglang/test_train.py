"""Whole runs on a real server: of sharded trainers, of several replicas, and of one that owns its server."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from sdpg_megatron.rollout.sglang.publish import UNFINISHED
from tests.e2e.runs import ROOT, command, environment, metrics, train, write_run
from tests.sglang.conftest import CPU_ARGUMENTS, Running, handles, wait_until_gone

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2_pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "dp2_disk": (2, ["rollout.sglang.transport=disk"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_on_a_server(server: Running, model: Path, tmp_path: Path, layout: str) -> None:
    """Each publish is proved three ways: checksums, the next samples' log-probs, and transformers on the export."""
    ranks, overrides = LAYOUTS[layout]
    config = write_run(tmp_path, steps=2)
    served = ["rollout.engine=sglang", f"rollout.sglang.urls=[{server.url}]", "rollout.sglang.verify_every=1"]
    done = train(
        config, f"model.path={model}", *served, *overrides, "optimizer.schedule=constant", "eval.every=0", ranks=ranks
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for step in metrics(tmp_path / "run")[1:]:
        assert step["rollout/logprob_diff_max"] < 1e-3
        assert step["rollout/effective_sample_size"] == pytest.approx(1, abs=1e-3)
    trained = tmp_path / "run" / "model"
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, trained))
    assert any(not torch.equal(old, new) for old, new in zip(before.parameters(), after.parameters(), strict=True))
    assert_answers_as(server.url, after)


def test_a_server_that_generates_one_step_ahead(server: Running, model: Path, tmp_path: Path) -> None:
    """Two replicas, whose leaders ask the same server from threads of their own while the ranks learn."""
    config = write_run(tmp_path, steps=3, eval={"every": 2, "samples": 1})
    served = ["rollout.engine=sglang", f"rollout.sglang.urls=[{server.url}]", "rollout.sglang.verify_every=1"]
    ahead = ["rollout.ahead=1", "objective.correction=truncate", "optimizer.schedule=constant"]
    done = train(config, f"model.path={model}", *served, *ahead, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = metrics(tmp_path / "run")[1:]
    assert [step["rollout/staleness"] for step in steps] == [0, 1, 1]
    assert steps[0]["rollout/logprob_diff_max"] < 1e-3 < min(step["rollout/logprob_diff_max"] for step in steps[1:])
    assert_answers_as(server.url, AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32))


def test_a_rank_that_dies_in_a_publish_ends_the_run_and_the_same_command_works(
    server: Running, model: Path, tmp_path: Path
) -> None:
    config = write_run(tmp_path, steps=2)
    arguments = [config, f"model.path={model}", "rollout.engine=sglang", f"rollout.sglang.urls=[{server.url}]"]
    arguments += ["parallel.tensor=2", "optimizer.schedule=constant", "eval.every=0"]
    died = train(*arguments, ranks=2, program="tests.sglang.dying_rank", fresh=True)
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL)" in died.stderr
    assert [step["step"] for step in metrics(tmp_path / "run")] == [0, 1], "weights are published when they are wanted"
    assert version(server.url).startswith(UNFINISHED), "samples of half-written weights would pass for real ones"
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(config) in (p.info["cmdline"] or [])]
    done = train(*arguments, "rollout.sglang.verify_every=1", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["rollout/logprob_diff_max"] < 1e-3 for step in steps[1:])


def test_a_run_outlives_its_only_server(model: Path, tmp_path: Path) -> None:
    """The server that the run has started is killed after the first step: it comes back, gets weights, and goes on.

    It shares the trainer's device, in that all calls for it are made: a CPU has no memory to give back.
    """
    config = write_run(tmp_path, steps=2)
    arguments = [config, f"model.path={model}", "rollout.engine=sglang", "optimizer.schedule=constant", "eval.every=0"]
    arguments += ["rollout.sglang.colocated=true", "rollout.sglang.transport=shared"]
    arguments.append(f"rollout.sglang.arguments={json.dumps(CPU_ARGUMENTS)}")
    run = subprocess.Popen(command(arguments), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    guards: list[int] = []
    try:
        assert run.stdout is not None
        for line in run.stdout:
            if "1/2" in line.split():
                guards = [child.pid for child in psutil.Process(run.pid).children() if is_guard(child)]
                schedulers = [p for guard in guards for p in handles(guard) if p.name().startswith("sglang::scheduler")]
                assert schedulers
                for process in schedulers:
                    process.kill()
        assert run.wait(timeout=60) == 0
    finally:
        run.kill()
    steps = metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert all(step["rollout/logprob_diff_max"] < 1e-3 for step in steps[1:])
    log = (tmp_path / "run" / "logs" / "sglang-0.log").read_text()
    assert log.count("The server is fired up and ready to roll!") == 2
    for guard in guards:
        wait_until_gone(guard)


def version(url: str) -> str:
    """What the server calls its weights."""
    with urllib.request.urlopen(f"{url}/model_info", timeout=30) as answer:
        return str(json.load(answer)["weight_version"])


def is_guard(process: psutil.Process) -> bool:
    return any(part.endswith("/process_guard.py") for part in process.cmdline())


@torch.no_grad()
def assert_answers_as(url: str, model: Any) -> None:
    """The server's greedy tokens are the model's, and their log-probs within 1e-3."""
    prompts = [[11, 12, 13, 14], [7], list(range(30, 60))]
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        "return_logprob": True,
    }
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.load(answer)
    for prompt, one in zip(prompts, found, strict=True):
        tokens = one["output_ids"]
        logits_NV = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        assert tokens == logits_NV.argmax(-1).tolist()
        expected_N = logits_NV.log_softmax(-1)[range(len(tokens)), tokens]
        logprobs_N = torch.tensor([pair[0] for pair in one["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(logprobs_N, expected_N, rtol=0, atol=1e-3)
