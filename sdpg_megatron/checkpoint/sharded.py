"""Save and load the policy trainer's tensors in Megatron's sharded form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

from sdpg_megatron.checkpoint.pickles import only_weights, read_tensor_list
from sdpg_megatron.checkpoint.state import RunState
from sdpg_megatron.mcore.compat import padded_buckets, torch_adam
from sdpg_megatron.mcore.optimizer import keeping_hyperparameters
from sdpg_megatron.mcore.policy_trainer import PolicyTrainer

_TEACHER = "teacher"
# Optimizer shards in this layout can be loaded under any other parallel layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(
    policy_trainer: PolicyTrainer, *, is_loading: bool = False, with_teacher: bool = True
) -> dict[str, Any]:
    """Model, optimizer and schedule as Megatron's sharded state dict, under Megatron-LM's keys.

    A teacher with separate weights is included, under prefixed keys.
    """
    metadata = dict(_METADATA)  # Megatron adds process groups to it
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named_chunks(policy_trainer)
    }
    teacher = _teacher_state(state, policy_trainer) if with_teacher else {}
    with padded_buckets.kept(policy_trainer.optimizer):
        state["optimizer"] = policy_trainer.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
    state["opt_param_scheduler"] = policy_trainer.scheduler.state_dict()
    return {**state, _TEACHER: teacher} if teacher else state


def _teacher_state(model_state: dict[str, Any], policy_trainer: PolicyTrainer) -> dict[int, Any]:
    """The teacher's weights by parameter number, sharded as the model's; empty without separate weights."""
    if not policy_trainer.teacher.kept:
        return {}
    parameters = [parameter for chunk in policy_trainer.chunks for parameter in chunk.parameters()]
    sharded = get_param_id_to_sharded_param_map(model_state, parameters)
    return {
        number: make_sharded_optimizer_tensor(sharded[number], kept, _TEACHER)
        for number, kept in enumerate(policy_trainer.teacher.kept)
    }


def load_sharded(path: Path, policy_trainer: PolicyTrainer, state: RunState) -> None:
    """Load a checkpoint's tensors into the policy trainer, from any parallel layout.

    Learning rate, weight decay, betas and epsilon keep the values of the policy trainer's configuration. The position
    in the learning-rate schedule is scaled if the number of optimizer steps per rollout step has changed. A teacher
    with separate weights starts from the student's if the checkpoint has none of that kind.

    Raises:
        CheckpointError: reading the metadata would run code.
    """
    tensors = read_tensor_list(path).state_dict_metadata  # megatron-core reads it without restrictions
    kind = state.setting("objective.teacher") or policy_trainer.teacher.kind
    with_teacher = kind == policy_trainer.teacher.kind and any(name.startswith(f"{_TEACHER}.") for name in tensors)
    with torch_adam.loading(policy_trainer.optimizer):
        with only_weights():
            wanted = sharded_state(policy_trainer, is_loading=True, with_teacher=with_teacher)
            loaded = dist_checkpointing.load(wanted, str(path))
        for name, chunk in _named_chunks(policy_trainer):
            chunk.load_state_dict(loaded[name])
        with keeping_hyperparameters(policy_trainer.optimizer):
            policy_trainer.optimizer.load_state_dict(loaded["optimizer"])
    schedule = loaded["opt_param_scheduler"]
    before = state.setting("optimizer.minibatches") or policy_trainer.minibatches
    schedule["num_steps"] = max(1, round(schedule["num_steps"] * policy_trainer.minibatches / before))
    policy_trainer.scheduler.load_state_dict(schedule)
    for number, kept in enumerate(policy_trainer.teacher.kept if with_teacher else ()):
        kept.copy_(loaded[_TEACHER][number])
    if not with_teacher:
        policy_trainer.teacher.restart()


def _named_chunks(policy_trainer: PolicyTrainer) -> list[tuple[str, Any]]:
    modules = [chunk.module for chunk in policy_trainer.chunks]
    if len(modules) == 1:
        return [("model", modules[0])]
    return [(f"model{number}", module) for number, module in enumerate(modules)]
