"""Final report of a run: its numbers, its files, and commands for the trained model."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from sdpg_megatron.config import RunConfig
from sdpg_megatron.evaluation.results import SUMMARY_FILE as EVAL_SUMMARY_FILE
from sdpg_megatron.mcore.compat import device
from sdpg_megatron.observe.progress import format_seconds
from sdpg_megatron.observe.report import CURVE_FILE
from sdpg_megatron.observe.rollout_log import FOLDER as ROLLOUT_FOLDER
from sdpg_megatron.observe.summary import Summary
from sdpg_megatron.observe.writers import METRICS_FILE, TENSORBOARD_FOLDER
from sdpg_megatron.rollout.sglang.interpreter import default_python
from sdpg_megatron.train.run_dir import EVAL_FOLDER, EXPORT_FOLDER

FILES = {
    EXPORT_FOLDER: "the trained model, a Hugging Face folder",
    METRICS_FILE: "every metric of every step",
    TENSORBOARD_FOLDER: "the same, for TensorBoard",
    CURVE_FILE: "reward, accuracy, KL and entropy over the steps",
    ROLLOUT_FOLDER: "responses of each step",
    EVAL_FOLDER: "each evaluation, problem by problem",
    "checkpoints": "complete training states, to continue from",
}
"""Contents of a run's folder, by name."""
SCRIPT = "sdpg-megatron"
CPU_SERVER = "--device cpu --dtype float32 --attention-backend torch_native --sampling-backend pytorch"


def describe_run(config: RunConfig, summary: Summary) -> str:
    """Return the report of a finished run, several lines."""
    run_dir = config.run_dir
    found = {name: text for name, text in FILES.items() if (run_dir / name).exists()}
    width = max(map(len, found), default=0) + 2
    files = [f"  {name + '/' * (run_dir / name).is_dir():<{width}}{text}" for name, text in found.items()]
    commands = [f"  {command}" for command in _commands(config)]
    return "\n".join([_numbers(summary), f"{run_dir}:", *files, "next:", *commands])


def _numbers(summary: Summary) -> str:
    plural = "" if summary.steps == 1 else "s"
    parts = [f"done: {summary.steps} step{plural} in {format_seconds(summary.seconds)}"]
    if summary.reward is not None:
        parts.append(f"reward {summary.reward:.3f} in the last one")
    for name, before, after in (
        ("accuracy", summary.accuracy_before, summary.accuracy_after),
        ("greedy", summary.greedy_before, summary.greedy_after),
    ):
        if before is not None and after is not None:
            parts.append(f"{name} {before:.3f} -> {after:.3f}")
    return ", ".join(parts)


def _commands(config: RunConfig) -> Iterator[str]:
    """Command lines for this directory and environment. The server needs an interpreter with sglang."""
    run_dir, sdpg, quote = config.run_dir, program(), shlex.quote
    gym = config.data.reasoning_gym
    files = [] if config.data.eval or gym.tasks else ["data.eval=[FILE.jsonl]"]
    if gym.held_out or not gym.tasks:
        yield " ".join([sdpg, "eval", quote(str(run_dir)), "--out", quote(f"{run_dir}-eval"), *files])
    evaluations = sorted(path.parent for path in (run_dir / EVAL_FOLDER).glob(f"step_*/{EVAL_SUMMARY_FILE}"))
    if len(evaluations) > 1:
        yield f"{sdpg} compare {quote(str(evaluations[0]))} {quote(str(evaluations[-1]))}"
    model = run_dir / EXPORT_FOLDER
    if not model.exists():
        yield f"{sdpg} convert {quote(str(run_dir))} {quote(f'{run_dir}-hf')}"
        return
    yield f"{sdpg} convert {quote(str(model))} {quote(f'{run_dir}-megatron')}"
    python = config.rollout.sglang.python or default_python()
    server = f"{quote(python)} -m sglang.launch_server --model-path {quote(str(model))}"
    on_cpu = device.training_device().type == "cpu"
    yield f"SGLANG_USE_CPU_ENGINE=1 {server} {CPU_SERVER}" if on_cpu else server


def program() -> str:
    """Return how the shell finds this environment's ``sdpg-megatron``: by name, by path, or as a module."""
    script = Path(sys.executable).with_name(SCRIPT)
    found = shutil.which(SCRIPT)
    if found is not None and os.path.realpath(found) == os.path.realpath(script):
        return SCRIPT
    if script.exists():
        return shlex.quote(os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script))
    return f"{shlex.quote(sys.executable)} -m sdpg_megatron"
