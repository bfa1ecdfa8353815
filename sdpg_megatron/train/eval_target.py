"""Target of ``sdpg-megatron eval``: settings and the location of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdpg_megatron.checkpoint.state import CHECKPOINT_FOLDER, CONFIG_FILE, checkpoint_folders, step_of
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import apply_override, load_config, parse
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.evaluation.results import response_limit
from sdpg_megatron.hf_files import fix_for_missing
from sdpg_megatron.observe.summary import read_summary
from sdpg_megatron.train.run_dir import EXPORT_FOLDER


@dataclass(frozen=True, slots=True)
class EvalTarget:
    """Model to evaluate, with a configuration limited to the evaluation's response length."""

    name: str
    """Name for display."""
    config: RunConfig
    """`model.path` is the folder of the weights; with a checkpoint, the model that the run started from."""
    checkpoint: Path | None = None


def find_eval_target(target: Path, step: int | None, overrides: Sequence[str]) -> EvalTarget:
    """Find the model and settings that the command line names.

    Args:
        target: a run's YAML file, for the model that it starts from; a run's folder, for its trained model; or a
            Hugging Face folder.
        step: training step of the run; None for the newest of a folder, or the model of a file.
        overrides: ``section.field=value`` items.

    Raises:
        ConfigError: `target` is none of these, the run has no such step, or the configuration is faulty.
    """
    eval_target = _find(target, step, overrides)
    limits = {"max_response_tokens": response_limit(eval_target.config)}  # the model need not support more
    rollout = eval_target.config.rollout.model_copy(update=limits)
    return replace(eval_target, config=eval_target.config.model_copy(update={"rollout": rollout}))


def _find(target: Path, step: int | None, overrides: Sequence[str]) -> EvalTarget:
    if target.is_file():
        config = load_config(target, overrides)
        return EvalTarget(str(config.model.path), config) if step is None else _of_run(config, step)
    if (target / CONFIG_FILE).is_file():
        return _of_run(load_config(target / CONFIG_FILE, overrides).model_copy(update={"run_dir": target}), step)
    if (target / "config.json").is_file():
        if step is not None:
            raise ConfigError("--step", step, f"none with a Hugging Face folder ({target})", "name a run's folder")
        return EvalTarget(str(target), _bare(target, overrides))
    raise ConfigError(
        "TARGET",
        str(target),
        f"a run's YAML file, a run's folder (with {CONFIG_FILE}) or a Hugging Face folder (with config.json)",
        fix_for_missing(target),
    )


def _bare(model: Path, overrides: Sequence[str]) -> RunConfig:
    """Default configuration of a model without a run, with values for required fields that only training reads."""
    tree: dict[str, Any] = {
        "run_dir": ".",
        "steps": 1,
        "model": {"path": str(model)},
        "data": {"train": []},
        "optimizer": {"warmup_steps": 0},
    }
    for override in overrides:
        apply_override(tree, override)
    return parse(tree)


def _of_run(config: RunConfig, step: int | None) -> EvalTarget:
    """Target of the run's model after `step` steps, or the newest."""
    if step == 0:
        return EvalTarget(f"{config.run_dir}, before training", config)
    summary, exported = read_summary(config.run_dir), config.run_dir / EXPORT_FOLDER
    if summary is not None and step in (None, summary.steps) and (exported / "config.json").is_file():
        model = config.model.model_copy(update={"path": exported})
        return EvalTarget(f"{config.run_dir}, step {summary.steps}", config.model_copy(update={"model": model}))
    checkpoints = {step_of(path): path for path in checkpoint_folders(config.run_dir / CHECKPOINT_FOLDER)}
    chosen = max(checkpoints, default=0) if step is None else step
    if chosen not in checkpoints:
        there = f"one of its checkpoints (steps {', '.join(map(str, checkpoints)) or 'none'})"
        raise ConfigError("--step", step, f"{there} of {config.run_dir}", "name one of these, or 0 for the start")
    return EvalTarget(f"{config.run_dir}, step {chosen}", config, checkpoints[chosen])
