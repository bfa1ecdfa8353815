"""A run's settings: one YAML file plus ``key=value`` overrides, checked before any process group exists.

Checks that need the model's own configuration are in `sdpg_megatron.architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml
from pydantic import ValidationError

from sdpg_megatron.config import ObjectiveConfig, OptimizerConfig, ParallelConfig, RunConfig
from sdpg_megatron.errors import ConfigError, did_you_mean
from sdpg_megatron.methods import TEACHERLESS, UNDISTILLED
from sdpg_megatron.server_settings import server_faults


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run's configuration.

    Args:
        path: YAML file; relative paths in it are relative to the working directory.
        overrides: ``section.field=value`` items; the value is read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest valid one is named), value of the wrong type or range,
            or a combination that cannot work.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(str(path), found, "a readable YAML file in UTF-8", "check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that is none, or an endless number
        raise ConfigError(str(path), str(error), "valid YAML", "correct the syntax") from error
    if not isinstance(tree, dict):
        raise ConfigError(str(path), type(tree).__name__, "a mapping of sections", "see examples/")
    for override in overrides:
        apply_override(tree, override)
    return parse(tree)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in a nested mapping, in place; sections that are not there yet are made."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("command line", override, "key=value", "for example objective.beta=0.001")
    *sections, name = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(key, section, "a section", f"{section} is a single value")
    try:
        tree[name] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(key, text, "a YAML value", "quote it") from error


def parse(tree: Mapping[str, Any]) -> RunConfig:
    """Build a `RunConfig` from plain data and check it whole. Raises `ConfigError`."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        _raise_first(error)
    check(config)
    return config


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration by its fields' dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def check(config: RunConfig) -> None:
    """Cross-field checks that need nothing but the configuration. Raises `ConfigError`."""
    _check_data(config)
    _check_objective(config.objective)
    _check_contrast(config)
    _check_steps(config)
    _check_rewards(config)
    _check_parallel(config.parallel)
    _check_packed(config)
    _check_sampling(config)
    for fault in server_faults(config.rollout.sglang):
        raise fault
    _check_ahead(config)
    if wrong := [k for k in config.eval.k if not 1 <= k <= config.eval.samples]:
        expected = f"1 to eval.samples ({config.eval.samples})"
        raise ConfigError("eval.k", wrong[0], expected, "draw more samples, or remove it")


def _check_data(config: RunConfig) -> None:
    data, gym = config.data, config.data.reasoning_gym
    if not gym.tasks:
        if gym.held_out:
            raise ConfigError("data.reasoning_gym.held_out", gym.held_out, "0 without tasks", "use data.eval")
        if config.reward.verifier == "reasoning_gym":
            expected = "another verifier: the prompts of files have no reasoning-gym task"
            raise ConfigError("reward.verifier", "reasoning_gym", expected, "set data.reasoning_gym.tasks")
        return
    for name, files in (("train", data.train), ("eval", data.eval)):
        if files:
            expected = "none where data.reasoning_gym.tasks has some"
            fix = "remove one of the two" if name == "train" else "use data.reasoning_gym.held_out"
            raise ConfigError(f"data.{name}", [str(file) for file in files], expected, fix)


def _check_objective(objective: ObjectiveConfig) -> None:
    if objective.divergence == "sampled_token" and objective.top_k:
        raise ConfigError("objective.top_k", objective.top_k, "null with sampled_token", "remove it")
    if objective.name in UNDISTILLED and objective.beta:
        expected = f"0 with {objective.name}, which has no distillation term"
        raise ConfigError("objective.beta", objective.beta, expected, "use sdpg")
    if objective.name in TEACHERLESS:
        for field, found, none in (("teacher", objective.teacher, "current"), ("context", objective.context, "data")):
            if found != none:
                expected = f"{none} with {objective.name}, which has no teacher"
                raise ConfigError(f"objective.{field}", found, expected, "remove it")
    if objective.name == "rlsd" and objective.divergence != "sampled_token":
        expected = "sampled_token with rlsd, which reads no other token"
        raise ConfigError("objective.divergence", objective.divergence, expected, "remove it")


def _check_contrast(config: RunConfig) -> None:
    objective = config.objective
    if not objective.contrast:
        return
    if objective.name in UNDISTILLED:
        expected = f"0 with {objective.name}, which has no distillation term"
        raise ConfigError("objective.contrast", objective.contrast, expected, "use sdpg, opsd or opcd")
    for field, found, needed in (
        ("objective.context", objective.context, "data"),
        ("data.context_of", config.data.context_of, "own"),
    ):
        if found != needed:
            expected = f"0 with {field} {found}: it is taken from the divergence under the problem's own hint"
            raise ConfigError("objective.contrast", objective.contrast, expected, f"set {field} to {needed}")


def _check_steps(config: RunConfig) -> None:
    objective, rollout, optimizer = config.objective, config.rollout, config.optimizer
    if rollout.prompts_per_step % optimizer.minibatches:
        raise ConfigError(
            "optimizer.minibatches",
            optimizer.minibatches,
            f"a divisor of rollout.prompts_per_step ({rollout.prompts_per_step})",
            "choose one that divides it",
        )
    if objective.policy == "reinforce" and optimizer.minibatches > 1:
        raise ConfigError(
            "objective.policy",
            "reinforce",
            f"ratio with {optimizer.minibatches} mini-batches: from the second on, the samples are off-policy",
            "use ratio, or set optimizer.minibatches to 1",
        )
    ramp = (objective.beta_warmup_steps or 0) + (objective.beta_decay_steps or 0)
    if ramp > config.total_optimizer_steps:
        raise ConfigError(
            "objective.beta_warmup_steps + objective.beta_decay_steps",
            ramp,
            f"at most the run's {config.total_optimizer_steps} optimizer steps",
            "shorten them, or leave them null to have them scaled to the run",
        )
    if optimizer.warmup_steps > config.total_optimizer_steps:
        raise ConfigError(
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"at most the run's {config.total_optimizer_steps} optimizer steps",
            "shorten the warm-up",
        )
    _check_overlap(optimizer)
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError("optimizer.min_lr", optimizer.min_lr, f"at most lr ({optimizer.lr})", "lower it")


def _check_overlap(optimizer: OptimizerConfig) -> None:
    if optimizer.overlap_param_gather and not (optimizer.distributed and optimizer.overlap_grad_reduce):
        needed = "overlap_grad_reduce" if optimizer.distributed else "distributed"
        expected = f"false without optimizer.{needed}"
        raise ConfigError("optimizer.overlap_param_gather", True, expected, f"set optimizer.{needed}, or remove it")
    if optimizer.bucket_size and not optimizer.overlap_grad_reduce:
        expected = "null without optimizer.overlap_grad_reduce: everything then travels at once"
        raise ConfigError("optimizer.bucket_size", optimizer.bucket_size, expected, "remove it")


def _check_rewards(config: RunConfig) -> None:
    reward, selection, longest = config.reward, config.selection, config.rollout.max_response_tokens
    if reward.clip is not None and not reward.clip[0] < reward.clip[1]:
        raise ConfigError("reward.clip", reward.clip, "a lower and a higher bound", "for example [0, 1]")
    if reward.overlong_buffer is not None and reward.overlong_buffer > longest:
        expected = f"at most rollout.max_response_tokens ({longest})"
        raise ConfigError("reward.overlong_buffer", reward.overlong_buffer, expected, "lower it")
    if selection.oversample > 1 and not (selection.drop_dead or selection.filters):
        fix = "set selection.drop_dead or selection.filters, or remove it"
        raise ConfigError("selection.oversample", selection.oversample, "1 where no group is left out", fix)


def _check_parallel(parallel: ParallelConfig) -> None:
    if parallel.virtual_pipeline and parallel.pipeline < 2:
        raise ConfigError(
            "parallel.virtual_pipeline",
            parallel.virtual_pipeline,
            "null where parallel.pipeline is 1",
            "remove it or raise parallel.pipeline",
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence", True, "false where parallel.tensor is 1", "remove it")
    if max(parallel.expert_ranks, parallel.tensor) % min(parallel.expert_ranks, parallel.tensor):
        expected = f"a multiple or divisor of parallel.tensor ({parallel.tensor})"
        fix = "change parallel.expert_tensor, or leave it null"
        raise ConfigError("parallel.expert x parallel.expert_tensor", parallel.expert_ranks, expected, fix)
    if parallel.dispatcher == "allgather" and (parallel.expert_ranks > parallel.tensor or parallel.pipeline > 1):
        # Ranks gather equal shapes: those of data-parallel ranks differ, and in a pipeline megatron-core refuses it.
        expected = "alltoall with several pipeline stages, or experts over more ranks than parallel.tensor"
        raise ConfigError("parallel.dispatcher", "allgather", expected, "use alltoall")


def _check_packed(config: RunConfig) -> None:
    model = config.model
    if model.packed:
        if model.spec == "te" and model.dtype == "float32":
            # Nor has it any for context parallelism, which takes packed sequences alone.
            expected = "auto or local with model.dtype float32: Transformer Engine packs no sequences of float32"
            raise ConfigError("model.spec", "te", expected, "set model.dtype to bfloat16, or remove it")
        return
    for field, found, none in (
        ("parallel.context", config.parallel.context, 1),
        ("optimizer.micro_batch_tokens", config.optimizer.micro_batch_tokens, None),
    ):
        if found != none:
            expected = f"{none or 'null'} where model.packed is false"
            raise ConfigError(field, found, expected, "remove model.packed: false, or this")


def _check_ahead(config: RunConfig) -> None:
    rollout = config.rollout
    if not rollout.ahead:
        return
    if config.objective.correction == "none":
        expected = "0 with objective.correction none: responses of older weights need their importance weights"
        raise ConfigError("rollout.ahead", rollout.ahead, expected, "set objective.correction to truncate")
    if rollout.engine == "sglang" and rollout.sglang.colocated:
        expected = "0 where servers share the trainer's devices: only one of them has the memory"
        raise ConfigError("rollout.ahead", rollout.ahead, expected, "give the servers devices of their own")
    if rollout.engine == "hf" and (config.model.recompute or config.parallel.sequence):
        expected = (
            "0 for the embedded engine with model.recompute or parallel.sequence: Megatron then puts torch's generator "
            "back while the engine draws from it"
        )
        raise ConfigError("rollout.ahead", rollout.ahead, expected, "generate on servers: rollout.engine=sglang")


def _check_sampling(config: RunConfig) -> None:
    if config.rollout.top_p != 1:
        expected = (
            "1: samples would come from a truncated distribution; the loss and the recorded log-probs are those of "
            "the whole one"
        )
        fix = "remove it; eval.top_p is for evaluations"
        raise ConfigError("rollout.top_p", config.rollout.top_p, expected, fix)


def _raise_first(error: ValidationError) -> NoReturn:
    """Turn pydantic's report into one `ConfigError` about its first finding."""
    finding = error.errors()[0]
    field = ".".join(str(part) for part in finding["loc"])
    if finding["type"] == "extra_forbidden":
        *sections, name = [str(part) for part in finding["loc"]]
        hint = did_you_mean(name, _fields(sections))
        raise ConfigError(field, name, "a known key", hint or f"known here: {', '.join(_fields(sections))}") from error
    if finding["type"] == "missing":
        raise ConfigError(field, None, "a value", f"set {field} in the file or on the command line") from error
    raise ConfigError(field, finding["input"], finding["msg"], f"correct {field}") from error


def _fields(sections: Sequence[str]) -> list[str]:
    kind: Any = RunConfig
    for section in sections:
        kind = get_args(kind)[1] if get_origin(kind) is dict else kind.model_fields[section].annotation
    return list(kind.model_fields)
