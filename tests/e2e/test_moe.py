"""A run that trains a mixture of experts, spread over two ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.e2e.runs import metrics, train, weights, write_run
from tests.tiny import write_tiny_model


def test_a_run_over_expert_parallel_ranks(tmp_path: Path) -> None:
    start = write_tiny_model(tmp_path / "moe", "qwen3_moe", tied=True, seed=5, layers=2)
    config = write_run(tmp_path, steps=2, model={"path": str(start)}, checkpoint={"every": 1}, eval={"samples": 1})
    done = train(config, "parallel.expert=2", "rollout.replay_routing=true", ranks=2)
    assert done.returncode == 0, done.stderr
    # The engine has the experts that are trained, before the first step and after it.
    steps = metrics(tmp_path / "run")[1:]
    assert all(0 < step["rollout/logprob_diff_max"] < 1e-4 for step in steps)
    # Each step's second mini-batch has weights that did not sample it, and is sent where the first ones sent it.
    assert all(0 < step["rollout/routing_difference"] < 0.2 for step in steps)
    before, after = load_file(start / "model.safetensors"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert {name for name in before if "gate" in name} <= set(moved)
    assert "2 ranks (tensor 1 x pipeline 1 x context 1 x data 2)" in done.stdout
