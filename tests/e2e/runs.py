"""Starting runs and reading what they left."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from sdpg_megatron.observe.writers import read_metrics
from tests.e2e.preloaded import Preloaded
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
TIMES = ("time/", "speed/")
LIMIT = 280.0
"""Seconds that a run may take."""


def write_run(folder: Path, **changes: Any) -> Path:
    """A run of four steps on a tiny random Qwen3, evaluation and checkpoints included; returns its YAML file."""
    model = write_tiny_model(folder / "hf", "qwen3", tied=True, seed=5)
    questions = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(12)]
    for name, rows in (("train", questions[:9]), ("eval", questions[9:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(folder / "run"),
        "steps": 4,
        "model": {"path": str(model)},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "eval": [str(folder / "eval.jsonl")],
            "max_prompt_tokens": 128,
        },
        "reward": {"verifier": "tests.e2e.verifier:has_digit"},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 6},
        "objective": {"beta": 0.5, "alpha": 0.1, "beta_warmup_steps": 0, "beta_decay_steps": 0},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine", "minibatches": 2, "micro_batch_size": 4},
        "eval": {"every": 2, "samples": 2},
        "checkpoint": {"every": 2},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(
    arguments: Sequence[object], ranks: int = 1, program: str = "sdpg_megatron", what: str = "train"
) -> list[str]:
    return _line(program, [what, *arguments], ranks)


def _line(program: str, arguments: Sequence[object], ranks: int) -> list[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *launcher, program, *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def train(
    *arguments: object, ranks: int = 1, program: str = "sdpg_megatron", fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the caller looks at the exit code. `fresh`: see `run_module`."""
    return run_module(program, "train", *arguments, ranks=ranks, fresh=fresh)


def evaluate(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """``sdpg-megatron eval``."""
    return run_module("sdpg_megatron", "eval", *arguments, ranks=ranks)


def run_module(
    program: str, *arguments: object, ranks: int = 1, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a module to the end. Ranks are forks of a process with all imports done, unless they are to be `fresh`.

    A run's verifier process imports the module as well: one that has its heavy imports in functions is ready sooner.
    """
    if fresh or torch.cuda.is_available():  # to look for a GPU is what a fork must not have done
        line = _line(program, arguments, ranks)
        return subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    return preloaded().run(program, list(map(str, arguments)), rank_environments(ranks), LIMIT)


def train_with_lost_rank(*arguments: object, ranks: int, program: str, lost: int) -> list[tuple[int, str]]:
    """Exit code and standard error of each rank; the lost one is killed when the others have ended."""
    line = ["train", *map(str, arguments)]
    return preloaded().run_with_lost(program, line, rank_environments(ranks), LIMIT, lost)


def rank_environments(ranks: int, *, launched: bool = False) -> list[dict[str, str]]:
    """Environment of each rank, with torchrun's variables for several ranks, or always if `launched`."""
    if ranks == 1 and not launched:
        return [environment()]
    with socket.create_server(("127.0.0.1", 0)) as found:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    return [{**environment(), **shared, **dict.fromkeys(("RANK", "LOCAL_RANK"), str(n))} for n in range(ranks)]


@functools.cache
def preloaded() -> Preloaded:
    """One for all tests of this process."""
    process = Preloaded(ROOT, environment())
    atexit.register(process.close)
    return process


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl, one a step, without what a clock measured."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{name: value for name, value in record.items() if not name.startswith(TIMES)} for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(run_dir: Path) -> dict[str, Any]:
    """The exported model's tensors."""
    return dict(load_file(run_dir / "model" / "model.safetensors"))
