"""Configuration of SDPG inside verl: a YAML file beside verl's own configuration, and the refusal of what cannot work.

Arguments are verl's configuration objects: `engine` is a ``McoreEngineConfig``, `model` an ``HFModelConfig`` and
`actor` an ``ActorConfig``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import parse, read_tree
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.objectives import build_objective, passes_of_run

CONFIG_VARIABLE = "SDPG_CONFIG"
"""Environment variable with the path of the YAML file."""
SECTIONS = ("objective", "head")
"""Sections of the file. verl's configuration decides everything else."""
DECIDED: Mapping[str, str] = {
    "advantage_deviation": "algorithm.adv_estimator and algorithm.norm_adv_by_std_in_grpo",
    "aggregation": "actor_rollout_ref.actor.loss_agg_mode",
    "correction": "algorithm.rollout_correction",
    "correction_level": "algorithm.rollout_correction",
    "correction_bound": "algorithm.rollout_correction",
    "peer_reward": "the data set or the agent loop",
    "strip_peer_thinking": "the data set or the agent loop",
}
"""Fields of `objective` without an effect in verl, and what decides instead."""


def read_settings(total_steps: int, model_folder: str) -> RunConfig:
    """Read the sections `objective` and `head` of the file that ``SDPG_CONFIG`` names.

    Args:
        total_steps: verl's number of training steps, the unit of the schedules.

    Raises:
        ConfigError: the variable is not set, or the file is invalid or has fields that cannot work in verl.
    """
    if not (name := os.environ.get(CONFIG_VARIABLE)):
        expected = f"the path of a YAML file with the sections {' and '.join(SECTIONS)}"
        raise ConfigError(CONFIG_VARIABLE, name, expected, "set this environment variable on every node")
    if total_steps < 1:
        fix = "set trainer.total_training_steps, or remove your own value of optim.total_training_steps"
        raise ConfigError("actor_rollout_ref.actor.optim.total_training_steps", total_steps, "at least 1", fix)
    tree = read_tree(Path(name))
    faults = list(_without_effect(tree))
    if faults:
        raise ConfigError.joined(faults)
    # The other sections are placeholders: nothing here reads them.
    rest = {"run_dir": ".", "steps": total_steps, "data": {}, "model": {"path": model_folder}}
    config = parse({**tree, **rest, "optimizer": {"warmup_steps": 0}})
    faults = list(_unsupported_objective(config))
    if faults:
        raise ConfigError.joined(faults)
    return config


def _without_effect(tree: Mapping[str, Any]) -> Iterator[ConfigError]:
    for section in tree:
        if section not in SECTIONS:
            expected = f"only the sections {' and '.join(SECTIONS)}"
            yield ConfigError(section, section, expected, "remove it: verl's configuration decides it")
    given = tree.get("objective")
    objective: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    for field, instead in DECIDED.items():
        if field in objective:
            yield ConfigError(f"objective.{field}", str(objective[field]), "no value", f"remove it: {instead} decides")


def _unsupported_objective(config: RunConfig) -> Iterator[ConfigError]:
    objective = config.objective
    if objective.teacher != "current":
        expected = "current: verl's checkpoints hold no weights of a teacher"
        yield ConfigError("objective.teacher", objective.teacher, expected, "set objective.teacher to current")
    if objective.context != "data":
        fix = "set it to data, and let an agent loop put the teacher's prompt into extra_fields"
        yield ConfigError("objective.context", objective.context, "data", fix)
    if objective.distill_average != "all":
        yield ConfigError("objective.distill_average", objective.distill_average, "all", "set it to all")
    if passes_of_run(build_objective(objective, config.steps), config.steps).teacher_logprob:
        expected = "an objective without the teacher's log-probs from before the first update of a rollout"
        fix = "with rlsd set objective.credit_ratio to current; remove objective.distill_loss"
        yield ConfigError("objective.name", objective.name, expected, fix)


def check_engine(engine: Any, model: Any) -> None:
    """Refuse settings of verl's engine and model that this engine does not support.

    Raises:
        ConfigError: names all of them.
    """
    if faults := list(_unsupported_engine(engine, model)):
        raise ConfigError.joined(faults)


def _unsupported_engine(engine: Any, model: Any) -> Iterator[ConfigError]:
    actor, hf_model = "actor_rollout_ref.actor.megatron", "actor_rollout_ref.model"
    if engine.use_fused_kernels:
        expected = "false: verl's fused kernels replace the output layer, which hands over hidden states here"
        yield ConfigError(f"{hf_model}.use_fused_kernels", True, expected, "set it to False")
    if model.mtp.enable:
        yield ConfigError(f"{hf_model}.mtp.enable", True, "no multi-token prediction", "set it to False")
    if getattr(model.hf_config, "vision_config", None) is not None:
        yield ConfigError(f"{hf_model}.path", model.local_path, "a model of text only", "choose another model")
    if engine.dynamic_context_parallel:
        expected = "false: the teacher's sequences need their own layout"
        yield ConfigError(f"{actor}.dynamic_context_parallel", True, expected, "use context_parallel_size")
    if engine.context_parallel_size > 1 and not engine.use_remove_padding:
        expected = "1 without packed sequences"
        fix = f"set {hf_model}.use_remove_padding to True"
        yield ConfigError(f"{actor}.context_parallel_size", engine.context_parallel_size, expected, fix)
    if engine.router_replay.mode != "disabled":
        expected = "disabled: the teacher's sequences have no recorded experts"
        yield ConfigError(f"{actor}.router_replay.mode", engine.router_replay.mode, expected, "set it to disabled")
    if engine.use_megatron_fsdp:
        expected = "false: the head needs this rank's whole shard of the output matrix"
        yield ConfigError(f"{actor}.use_megatron_fsdp", True, expected, "set it to False")
    if engine.dtype == "float16":
        yield ConfigError(f"{actor}.dtype", "float16", "bfloat16", "set it to bfloat16")


def actor_config(loss_function: Any) -> Any:
    """verl's ``ActorConfig``, from the loss function that its worker gives to an engine.

    Raises:
        ConfigError: the loss function is not verl's PPO loss.
    """
    function, keywords = getattr(loss_function, "func", loss_function), getattr(loss_function, "keywords", {})
    if getattr(function, "__name__", "") != "ppo_loss" or "config" not in keywords:
        name = getattr(function, "__qualname__", repr(function))
        fix = "set distillation.enabled to False; use VERL_ENGINE_VENDOR=sdpg only for verl.trainer.main_ppo"
        raise ConfigError("loss function of the worker", name, "verl's ppo_loss", fix)
    return keywords["config"]


def check_actor(actor: Any, config: RunConfig) -> None:
    """Refuse terms of verl's loss that this engine does not compute; the objective has its own.

    Raises:
        ConfigError: names all of them.
    """
    faults = []
    prefix, mode = "actor_rollout_ref.actor", actor.policy_loss.get("loss_mode", "vanilla")
    if mode != "vanilla":
        expected = "vanilla: the policy loss is that of objective.policy"
        faults.append(ConfigError(f"{prefix}.policy_loss.loss_mode", mode, expected, "remove it"))
    if actor.entropy_coeff:
        expected = "0: the entropy bonus is objective.entropy_coefficient"
        faults.append(ConfigError(f"{prefix}.entropy_coeff", actor.entropy_coeff, expected, "set it to 0"))
    if actor.use_kl_loss and not config.objective.alpha:
        expected = "False with objective.alpha 0: the loss has no reference term"
        faults.append(ConfigError(f"{prefix}.use_kl_loss", True, expected, "set it to False, or set objective.alpha"))
    if faults:
        raise ConfigError.joined(faults)
