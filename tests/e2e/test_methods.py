"""Runs of each method on a tiny model: which passes they make, and that they train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdpg_megatron.observe.writers import read_metrics
from tests.e2e.runs import metrics, run_module, train, weights, write_run

MINIBATCHES, STEPS = 2, 2
OUTCOME = {"teacher": 0, "logprobs": MINIBATCHES * STEPS}
"""With two mini-batches every method needs the old policy's log-probs of each."""
TAUGHT = {**OUTCOME, "teacher": MINIBATCHES * STEPS}
HELD = {**OUTCOME, "logprobs": 2 * MINIBATCHES * STEPS}
RAMP = {"beta_warmup_steps": 0, "beta_decay_steps": 2}
"""beta is 0 at the last optimizer step."""
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "grpo": ({"name": "grpo"}, OUTCOME),
    "rpg": ({"name": "rpg"}, HELD),
    "sdpg": ({"name": "sdpg", "alpha": 0.0, **RAMP}, {**OUTCOME, "teacher": 3}),
    "opcd": ({"name": "opcd", **RAMP}, {**OUTCOME, "teacher": 3}),
    "rlsd_decayed": ({"name": "rlsd", "credit_decay_steps": 2}, {**OUTCOME, "teacher": 1}),
    "opsd": ({"name": "opsd"}, TAUGHT),
    "sdpo": ({"name": "sdpo"}, TAUGHT),
}
ONCE: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "sdpg_once": ({"objective": {"name": "sdpg", "alpha": 0.0, **RAMP}}, {"teacher": 1, "logprobs": 0}),
    "sdpg_dead": (
        {"objective": {"name": "sdpg", "alpha": 0.0}, "reward": {"verifier": "exact"}},
        {"teacher": 0, "logprobs": 0},
    ),
}
"""With one mini-batch. In the last step of the first beta is 0; in the second no response is right."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, int]]]:
    """The run folder of each case, and the passes that were made, all by one process."""
    changes = {name: {"objective": objective} for name, (objective, _) in CASES.items()}
    changes |= {name: changed for name, (changed, _) in ONCE.items()}
    folders = {name: tmp_path_factory.mktemp(name) for name in changes}
    configs = [
        write_run(
            folder,
            steps=STEPS,
            optimizer={"lr": 1e-3, "warmup_steps": 0, "minibatches": 1 if name in ONCE else MINIBATCHES},
            data={"train": [str(folder / "train.jsonl")], "max_prompt_tokens": 128},
            eval={},
            checkpoint={"export": False},
            **changes[name],
        )
        for name, folder in folders.items()
    ]
    done = run_module("tests.e2e.count_passes", *configs)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: (folder / "run", counts) for (name, folder), counts in zip(folders.items(), lines, strict=True)}


@pytest.mark.parametrize("name", [*CASES, *ONCE])
def test_a_run_makes_the_passes_that_its_method_needs(runs: dict[str, tuple[Path, dict[str, int]]], name: str) -> None:
    assert runs[name][1] == {**CASES, **ONCE}[name][1]


def test_dead_groups_alone_are_a_step_without_a_gradient(runs: dict[str, tuple[Path, dict[str, int]]]) -> None:
    records = read_metrics(runs["sdpg_dead"][0] / "metrics.jsonl")
    assert [record["reward/dead_groups"] for record in records] == [1.0] * STEPS
    assert [record["optimizer/grad_norm"] for record in records] == [0.0] * STEPS


@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_and_reports_rewards(runs: dict[str, tuple[Path, dict[str, int]]], name: str) -> None:
    run, _ = runs[name]
    first, second = read_metrics(run / "metrics.jsonl")
    assert 0 <= first["reward/mean"] <= 1
    assert second["optimizer/grad_norm"] > 0
    shown = yaml.safe_load((run / "config.yaml").read_text())["objective"]
    assert shown["name"] == CASES[name][0]["name"]


def test_sdpo_counts_the_responses_without_a_successful_peer(runs: dict[str, tuple[Path, dict[str, int]]]) -> None:
    """In every group of 4 with one success that one is alone, in one without all are."""
    for record in read_metrics(runs["sdpo"][0] / "metrics.jsonl"):
        assert 0 <= record["distill/without_context"] <= 16
        if record["distill/without_context"] < 16:
            assert record["distill/kl"] > 0
    assert "distill/without_context" not in read_metrics(runs["opsd"][0] / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    ("teacher", "ranks"),
    [(["objective.teacher=every", "objective.teacher_every=2"], 1), (["objective.teacher=ema"], 2)],
    ids=["every", "ema_pp2"],
)
def test_a_run_with_a_teacher_of_its_own_continues_bit_for_bit(tmp_path: Path, teacher: list[str], ranks: int) -> None:
    """From the checkpoint after step 3 of 4; neither teacher then is the student, or where the run started from."""
    config, run = write_run(tmp_path, eval={}, checkpoint={"every": 3}), tmp_path / "run"
    arguments = [config, *teacher, "objective.alpha=0", "optimizer.lr=0.01", f"parallel.pipeline={ranks}"]
    whole = train(*arguments, ranks=ranks)
    assert whole.returncode == 0, whole.stderr
    expected, records = weights(run), metrics(run)
    for written in ("checkpoints/step_00000004", "model"):
        shutil.rmtree(run / written)
    (run / "summary.json").unlink()
    continued = train(*arguments, ranks=ranks)
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step 3" in continued.stdout
    assert metrics(run) == records
    found = weights(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
