"""Evaluations from the command line: of a run's steps, of a Hugging Face folder, on one rank and several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdpg_megatron.cli import main
from tests.e2e.runs import evaluate, metrics, train, write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, evaluated before and after each on two data files."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_run(folder, steps=2, eval={"every": 1, "samples": 3}, checkpoint={"every": 1})
    (folder / "more.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    done = train(config, files(folder))
    assert done.returncode == 0, done.stderr
    return folder


def files(folder: Path) -> str:
    return f"data.eval=[{folder / 'eval.jsonl'}, {folder / 'more.jsonl'}]"


@pytest.fixture
def bare(trained: Path) -> list[str]:
    """What an evaluation of a Hugging Face folder has to be told to be as the run's."""
    return [
        files(trained),
        "data.max_prompt_tokens=128",
        "reward.verifier=tests.e2e.verifier:has_digit",
        "rollout.max_response_tokens=6",
        "eval.samples=3",
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def values(folder: Path, file: str = "eval") -> dict[str, float]:
    estimates = json.loads((folder / "summary.json").read_text())["scores"][file]["estimates"]
    return {name: estimate["value"] for name, estimate in estimates.items()}


def test_training_keeps_every_problems_results(trained: Path) -> None:
    for record in metrics(trained / "run"):
        folder = trained / "run" / "eval" / f"step_{int(record['step']):08d}"
        problems = {name: lines(folder / f"{name}.jsonl") for name in ("eval", "more")}
        assert [p["uid"] for p in problems["eval"]] == ["eval.jsonl:1", "eval.jsonl:2", "eval.jsonl:3"]
        assert [p["uid"] for p in problems["more"]] == ["more.jsonl:1"]
        for prefix, those in {
            "eval": [*problems["eval"], *problems["more"]],
            "eval/eval": problems["eval"],
            "eval/more": problems["more"],
        }.items():
            rewards = [reward for p in those for reward in p["sampled"]["rewards"]]
            greedy = [p["greedy"]["rewards"][0] for p in those]
            assert record[f"{prefix}/sampled_accuracy"] == pytest.approx(sum(rewards) / len(rewards))
            assert record[f"{prefix}/greedy_accuracy"] == sum(greedy) / len(greedy)
            assert 0 < record[f"{prefix}/length"] <= 6
            assert 0 <= record[f"{prefix}/truncated"] <= 1
            assert record[f"{prefix}/failures"] == 0
        for name in ("eval", "more"):
            assert record[f"eval/{name}/pass_at_3"] == pytest.approx(values(folder, name)["pass@3"])
            assert record[f"eval/{name}/majority_at_3"] == pytest.approx(values(folder, name)["majority@3"])


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_evaluated_afterwards_gives_what_training_saw(trained: Path, tmp_path: Path, step: int) -> None:
    """From the starting model, a Megatron checkpoint, and the exported model."""
    done = evaluate(trained / "run", "--step", step, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    seen = trained / "run" / "eval" / f"step_{step:08d}"
    for name in ("eval", "more"):
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (seen / f"{name}.jsonl").read_bytes()
        assert values(tmp_path / "out", name) == values(seen, name)
    assert f"step {step}" in done.stdout or step == 0
    assert "pass@3" in done.stdout
    if step == 1:
        exported = trained / "run" / "checkpoints" / "step_00000001" / "model"
        between, last = (AutoModelForCausalLM.from_pretrained(path) for path in (exported, trained / "run" / "model"))
        assert any(not torch.equal(a, b) for a, b in zip(between.parameters(), last.parameters(), strict=True))


def test_a_model_alone_and_an_evaluation_that_goes_on(trained: Path, tmp_path: Path, bare: list[str]) -> None:
    both = [*bare, "rollout.max_response_tokens=4096", "eval.max_response_tokens=6", "eval.responses=true"]
    out = tmp_path / "out"
    done = evaluate(trained / "run" / "model", *both, "--out", out)
    assert done.returncode == 0, done.stderr
    plain = lines(trained / "run" / "eval" / "step_00000002" / "eval.jsonl")
    for problem, expected in zip(lines(out / "eval.jsonl"), plain, strict=True):
        assert problem["sampled"]["rewards"] == expected["sampled"]["rewards"]
        assert [any(map(str.isdigit, text)) for text in problem["sampled"]["responses"]] == [
            bool(reward) for reward in problem["sampled"]["rewards"]
        ]
    first = (out / "more.jsonl").read_bytes()
    (out / "more.jsonl").unlink()
    (out / "summary.json").unlink()
    marked = (out / "eval.jsonl").read_text().replace('"failures": 0', '"failures": 1')
    (out / "eval.jsonl").write_text(marked)  # what is there is kept, and not made anew
    again = evaluate(trained / "run" / "model", *both, "--out", out)
    assert again.returncode == 0, again.stderr
    assert (out / "more.jsonl").read_bytes() == first
    assert (out / "eval.jsonl").read_text() == marked
    summary = json.loads((out / "summary.json").read_text())
    assert [summary["scores"][name]["problems"] for name in ("eval", "more")] == [3, 1]
    assert summary["scores"]["eval"]["failures"] == 6
    assert "more" in again.stdout


def test_a_checkpoint_of_another_layout(tmp_path: Path) -> None:
    """Two ranks turn a tensor-parallel checkpoint into a folder; then each is a replica, and one rank would do."""
    config = write_run(tmp_path, steps=1, checkpoint={"export": False}, optimizer={"warmup_steps": 0})
    two = ["parallel.tensor=2", "rollout.prompts_per_step=2", "objective.alpha=0"]
    assert train(config, *two, ranks=2).returncode == 0
    run = tmp_path / "run"
    shared = evaluate(run, "--out", tmp_path / "two", ranks=2)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("pass@1") == 1
    alone = evaluate(run, "--out", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    one, seen = tmp_path / "one" / "eval.jsonl", run / "eval" / "step_00000001" / "eval.jsonl"
    assert one.read_bytes() == seen.read_bytes()
    for by_two, by_one in zip(lines(tmp_path / "two" / "eval.jsonl"), lines(one), strict=True):
        assert (by_two["uid"], by_two["greedy"]) == (by_one["uid"], by_one["greedy"])
        assert len(by_two["sampled"]["rewards"]) == 2


def test_evaluations_side_by_side(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [trained / "run" / "eval" / f"step_{step:08d}" for step in (0, 2)]
    assert main(["compare", *map(str, steps)]) == 0
    shown = capsys.readouterr().out
    assert all(str(folder) in shown for folder in steps)
    assert "pass@3" in shown
    other = tmp_path / "other"
    shutil.copytree(steps[1], other)
    summary = other / "summary.json"
    summary.write_text(summary.read_text().replace('"eval.temperature": 1.0', '"eval.temperature": 0.5'))
    assert main(["compare", str(steps[0]), str(other)]) == 2
    assert "found eval.temperature: 0.5, expected 1.0" in capsys.readouterr().err
    assert main(["compare", str(steps[0]), "--anyway", str(other)]) == 0


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ("nowhere", [], "TARGET: found"),
        ("run", ["--step", 7], "--step: found 7, expected one of its checkpoints (steps 1, 2)"),
        ("hf", ["--step", 1], "--step: found 1, expected none with a Hugging Face folder"),
        ("hf", ["data.eval=[]"], "data.eval: found ()"),
        ("hf", ["data.eval=[nowhere.jsonl]"], "nowhere.jsonl"),
        ("hf", ["data.max_prompt_tokens=3"], "found 4 rows, all longer than 3 tokens"),
        ("hf", ["data.eval=[TRAINED/eval.jsonl, TRAINED/empty.jsonl]"], "empty.jsonl: found no rows"),
        ("hf", ["eval.sample=3"], "did you mean 'samples'"),
        ("hf", ["eval.k=[9]"], "eval.k: found 9"),
        ("run.yaml", ["model.path=nowhere"], "model.path"),
        ("run", ["reward.verifier=tests.e2e.verifier:has_digits"], "has_digit"),
    ],
)
def test_mistakes_are_named_in_one_line(
    trained: Path,
    tmp_path: Path,
    bare: list[str],
    target: str,
    more: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (trained / "empty.jsonl").touch()
    arguments = [*(bare if target == "hf" else []), *(str(item).replace("TRAINED", str(trained)) for item in more)]
    assert main(["eval", str(trained / target), *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_evaluation_is_left_alone(trained: Path) -> None:
    taken = trained / "run" / "eval" / "step_00000002"
    before = sorted((path.name, path.read_bytes()) for path in taken.iterdir())
    refused = evaluate(trained / "run", "eval.samples=2", "--out", taken)
    assert refused.returncode == 2
    assert "evaluation.json: found results of" in refused.stderr
    dry = evaluate(trained / "run", "eval.samples=2", "--out", taken, "--dry-run")
    assert dry.returncode == 2
    assert "evaluation.json: found results of" in dry.stderr
    assert sorted((path.name, path.read_bytes()) for path in taken.iterdir()) == before


def test_a_dry_run_reads_everything_and_evaluates_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(trained / "run.yaml"), "--dry-run", "eval.samples=5", "--out", str(tmp_path / "out")]) == 0
    assert "samples: 5" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
