"""The step's benchmark: its plain loop computes what the trainer computes, and the script writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step_data import even_lengths, given_groups, long_tailed_lengths
from tests.pool import RankPool
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
KEYS = ["sdpg_over_beta0", "gated_share", "packed_over_padded", "step_over_plain"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama", tied=True, seed=5)


def config_of(model: Path, folder: Path) -> Any:
    """Terms so large that none can hide behind another, and steps so large that the second is of another policy."""
    from sdpg_megatron.config.load import parse

    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    terms = {"alpha": 0.3, "beta": 0.7, "beta_warmup_steps": 1, "beta_decay_steps": 0}
    adam = {"lr": 1e-2, "eps": 1e-2, "warmup_steps": 0, "clip_grad": 0.5, "micro_batch_size": 4}
    return parse(
        {
            "run_dir": str(folder / "run"),
            "steps": 8,
            "model": {"path": str(model)},
            "data": {"train": [str(folder / "train.jsonl")], "max_prompt_tokens": 128},
            "reward": {"verifier": "benchmarks.step_data:coin"},
            "rollout": {
                "prompts_per_step": 2,
                "group_size": 4,
                "max_response_tokens": 6,
                "temperature": 0.8,
                "mismatch_limit": None,
            },
            "objective": terms,
            "optimizer": adam,
        }
    )


def two_steps(model: Path, folder: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Loss and gradient norm of two steps on the same responses: the trainer's and the plain loop's."""
    from benchmarks.step_plain import PlainLoop, responses_of
    from benchmarks.step_trainer import StandingPolicyTrainer
    from sdpg_megatron.mcore.compat.device import training_device

    config = config_of(model, folder)
    groups = given_groups(even_lengths(8, 20), 4, vocab=300)
    plain = PlainLoop(config, lambda prompt, text: 0.0, training_device())
    trainer = StandingPolicyTrainer(config)
    steps = [trainer.learn(groups, step) for step in (1, 2)]
    ours = [(step["train/loss"], step["optimizer/grad_norm"]) for step in steps]
    return ours, [plain.learn(responses_of(groups)) for _ in steps]


def test_the_plain_loop_learns_as_the_trainer_does(model: Path, ranks: RankPool, tmp_path: Path) -> None:
    ours, plain = ranks.run(two_steps, 1, model, tmp_path)[0]
    for expected, found in zip(ours, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert ours[0] != pytest.approx(ours[1], rel=0.1)


def test_given_responses_are_as_described() -> None:
    lengths = long_tailed_lengths(400, 1024)
    assert min(lengths) >= 16 and max(lengths) > 500 and sorted(lengths)[200] == pytest.approx(100, rel=0.2)
    groups = given_groups(lengths, 8, vocab=300)
    right = [len(c.tokens) for g in groups for c, reward in zip(g.group.completions, g.rewards, strict=True) if reward]
    assert len(right) == 200 and sum(right) / sum(lengths) == pytest.approx(0.5, abs=0.1)
    assert [len(c.tokens) for g in groups for c in g.group.completions] == lengths
    even = even_lengths(400, 200)
    assert (min(even), max(even)) == (20, 200) and even == even_lengths(400, 200)


def test_the_script_writes_its_results(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    small = ["--rounds=1", "--groups=1", "--prompts=2", "--longest=64", "--longest-even=40"]
    line = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--model", str(model), *small, "--out", str(out)]
    run = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert list(result) == KEYS and all(0 < value < 100 for value in result.values())
    assert result["gated_share"] == pytest.approx(0.5, abs=0.1)
    meta = json.loads((tmp_path / "step.json.meta.json").read_text())
    assert meta["command"].startswith("python benchmarks/step.py --model") and meta["machine"] and meta["date"]
    kinds = ["beta0", "sdpg", "sdpg_measured", "packed", "padded", "unsorted", "ours", "plain"]
    assert list(meta["steps"]) == kinds and all(len(one["seconds"]) == 1 for one in meta["steps"].values())
    assert meta["steps"]["beta0"]["gated_share"] == 0 < meta["steps"]["sdpg"]["gated_share"]
    ours, plain = meta["steps"]["ours"], meta["steps"]["plain"]
    for what in ("response_tokens", "gated_share"):  # they sample from one seed, but for rounding
        assert plain[what] == pytest.approx(ours[what], rel=0.2)
    assert "step_over_plain" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.json.meta.json"]


def test_the_script_says_which_model_is_missing(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--model", str(tmp_path / "none")]
    run = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and "scripts/setup.sh" in run.stderr
