"""The real model of the demonstration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.runs import metrics, train
from tools.make_addition import main as make_addition
from tools.prepare_smollm2 import FOLDER, default_cache

MODEL = default_cache() / FOLDER
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not MODEL.exists(), reason=f"needs {MODEL}, which scripts/setup.sh prepares"),
]


def test_a_step_on_two_ranks(tmp_path: Path) -> None:
    make_addition([str(tmp_path)])
    done = train(
        "examples/smollm2/addition.yaml",
        f"model.path={MODEL}",
        f"run_dir={tmp_path / 'run'}",
        f"data.train=[{tmp_path / 'train.jsonl'}]",
        "data.eval=[]",
        "eval.every=0",
        "steps=1",
        "optimizer.warmup_steps=0",
        "objective.beta_decay_steps=0",
        "objective.alpha=0.001",
        "rollout.prompts_per_step=2",
        "rollout.group_size=2",
        "objective.gate=false",
        "parallel.pipeline=2",
        "checkpoint.export=false",
        ranks=2,
    )
    assert done.returncode == 0, done.stderr
    (step,) = metrics(tmp_path / "run")
    assert step["rollout/logprob_diff_max"] < 1e-3
    assert step["distill/kl"] > 0.01  # the teacher, told the answer, differs from the student
    assert torch.tensor(step["optimizer/grad_norm"]) > 0
