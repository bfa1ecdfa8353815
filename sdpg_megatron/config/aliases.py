"""Field names of Megatron, verl, slime and TRL, and their counterparts in this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

FIELD_OF: Mapping[str, str] = MappingProxyType(
    {
        # length and data of a run
        "output_dir": "run_dir", "default_local_dir": "run_dir", "save": "run_dir", "load": "run_dir",
        "train_iters": "steps", "max_steps": "steps", "num_rollout": "steps", "total_steps": "steps",
        "total_training_steps": "steps", "training_steps": "steps", "num_steps": "steps", "max_iters": "steps",
        "rollout_seed": "seed", "random_seed": "seed",
        "train_files": "data.train", "prompt_data": "data.train", "train_data": "data.train", "dataset": "data.train",
        "dataset_name": "data.train", "val_files": "data.eval", "eval_prompt_data": "data.eval",
        "eval_data": "data.eval", "eval_dataset": "data.eval", "input_key": "data.question_key",
        "prompt_key": "data.question_key", "label_key": "data.answer_key", "rollout_shuffle": "data.shuffle",
        "max_prompt_length": "data.max_prompt_tokens", "rollout_max_prompt_len": "data.max_prompt_tokens",
        "system_prompt": "data.system", "chat_template_kwargs": "data.template_options",
        "apply_chat_template_kwargs": "data.template_options",
        # model and layout
        "hf_checkpoint": "model.path", "ref_load": "model.path", "model_name_or_path": "model.path",
        "pretrained_checkpoint": "model.path", "model_path": "model.path",
        "bf16": "model.dtype (bfloat16)", "fp16": "model.dtype (bfloat16)", "precision": "model.dtype",
        "params_dtype": "model.dtype", "torch_dtype": "model.dtype", "transformer_impl": "model.spec",
        "recompute_granularity": "model.recompute", "recompute_activations": "model.recompute",
        "gradient_checkpointing": "model.recompute", "enable_gradient_checkpointing": "model.recompute",
        "moe_aux_loss_coeff": "model.router_aux_loss", "moe_z_loss_coeff": "model.router_z_loss",
        "tp": "parallel.tensor", "tp_size": "parallel.tensor", "tensor_parallel": "parallel.tensor",
        "tensor_parallel_size": "parallel.tensor", "tensor_model_parallel_size": "parallel.tensor",
        "pp": "parallel.pipeline", "pp_size": "parallel.pipeline", "pipeline_parallel_size": "parallel.pipeline",
        "pipeline_model_parallel_size": "parallel.pipeline", "vpp": "parallel.virtual_pipeline",
        "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
        "sp": "parallel.sequence", "sequence_parallel": "parallel.sequence",
        "cp": "parallel.context", "context_parallel_size": "parallel.context",
        "ep": "parallel.expert", "expert_model_parallel_size": "parallel.expert",
        "expert_parallel_size": "parallel.expert", "etp": "parallel.expert_tensor",
        "expert_tensor_parallel_size": "parallel.expert_tensor",
        "moe_token_dispatcher_type": "parallel.dispatcher",
        "distributed_timeout_minutes": "parallel.timeout (seconds)",
        # rollout
        "rollout_batch_size": "rollout.prompts_per_step", "train_batch_size": "rollout.prompts_per_step",
        "global_batch_size": "rollout.prompts_per_step (without the responses to each)",
        "batch_size": "rollout.prompts_per_step",
        "generation_batch_size": "rollout.prompts_per_step (without the responses to each)",
        "num_prompts_per_step": "rollout.prompts_per_step",
        "n": "rollout.group_size", "num_generations": "rollout.group_size",
        "n_samples_per_prompt": "rollout.group_size", "num_generations_per_prompt": "rollout.group_size",
        "samples_per_prompt": "rollout.group_size",
        "max_response_length": "rollout.max_response_tokens", "max_new_tokens": "rollout.max_response_tokens",
        "max_completion_length": "rollout.max_response_tokens", "max_tokens": "rollout.max_response_tokens",
        "rollout_max_response_len": "rollout.max_response_tokens", "rollout_temperature": "rollout.temperature",
        "use_vllm": "rollout.engine (hf or sglang)", "rollout_num_gpus_per_engine": "rollout.sglang.tensor",
        "gpu_memory_utilization": "rollout.sglang.mem_fraction", "mem_fraction_static": "rollout.sglang.mem_fraction",
        "sglang_mem_fraction_static": "rollout.sglang.mem_fraction", "colocate": "rollout.sglang.colocated",
        "sglang_server_concurrency": "rollout.sglang.concurrency", "async_training": "rollout.ahead",
        "over_sampling_batch_size": "selection.oversample", "dynamic_sampling": "selection.drop_dead",
        "dynamic_sampling_filter_path": "selection.filters", "filter_groups": "selection.drop_dead",
        "rm_type": "reward.verifier", "custom_rm_path": "reward.verifier", "reward_funcs": "reward.verifier",
        "reward_model": "reward.verifier", "custom_reward_function": "reward.verifier",
        # objective
        "adv_estimator": "objective.name", "advantage_estimator": "objective.name", "algorithm": "objective.name",
        "method": "objective.name", "loss_type": "objective.aggregation", "loss_agg_mode": "objective.aggregation",
        "eps_clip": "objective.clip_low", "epsilon": "objective.clip_low", "clip_ratio_low": "objective.clip_low",
        "clip_ratio": "objective.clip_low and objective.clip_high", "eps_clip_high": "objective.clip_high",
        "epsilon_high": "objective.clip_high", "clip_ratio_high": "objective.clip_high",
        "clip_ratio_c": "objective.dual_clip", "eps_clip_c": "objective.dual_clip",
        "kl_coef": "objective.alpha", "kl_loss_coef": "objective.alpha", "use_kl_loss": "objective.alpha",
        "kl_loss_type": "objective.reference", "entropy_coef": "objective.entropy_coefficient",
        "entropy_coeff": "objective.entropy_coefficient", "tis": "objective.correction",
        "use_tis": "objective.correction", "tis_imp_ratio_cap": "objective.correction_bound",
        # optimizer
        "learning_rate": "optimizer.lr", "lr_warmup_steps": "optimizer.warmup_steps",
        "lr_warmup_iters": "optimizer.warmup_steps", "lr_decay_style": "optimizer.schedule",
        "lr_scheduler_type": "optimizer.schedule", "adam_beta1": "optimizer.beta1", "adam_beta2": "optimizer.beta2",
        "adam_eps": "optimizer.eps", "adam_epsilon": "optimizer.eps", "grad_clip": "optimizer.clip_grad",
        "max_grad_norm": "optimizer.clip_grad", "ppo_mini_batch_size": "optimizer.minibatches (their number in a step)",
        "num_steps_per_rollout": "optimizer.minibatches",
        "mini_batch_size": "optimizer.minibatches (their number in a step)",
        "ppo_micro_batch_size_per_gpu": "optimizer.micro_batch_size",
        "per_device_train_batch_size": "optimizer.micro_batch_size",
        "max_tokens_per_gpu": "optimizer.micro_batch_tokens",
        "ppo_max_token_len_per_gpu": "optimizer.micro_batch_tokens",
        "use_dynamic_batch_size": "optimizer.micro_batch_tokens", "use_dynamic_bsz": "optimizer.micro_batch_tokens",
        "use_distributed_optimizer": "optimizer.distributed", "ddp_bucket_size": "optimizer.bucket_size",
        # evaluation and checkpoints
        "eval_interval": "eval.every", "eval_steps": "eval.every", "test_freq": "eval.every", "val_freq": "eval.every",
        "n_samples_per_eval_prompt": "eval.samples", "save_interval": "checkpoint.every",
        "save_steps": "checkpoint.every", "save_freq": "checkpoint.every", "save_total_limit": "checkpoint.keep",
        "async_save": "checkpoint.asynchronous",
    }
)  # fmt: skip
"""Field by the last part of another framework's name. Parentheses hold a hint about its value."""

NOTE_ON: Mapping[str, str] = MappingProxyType(
    {
        "epochs": "set steps: a run is measured in rollout steps, each of rollout.prompts_per_step prompts",
        **dict.fromkeys(
            ("wandb", "wandb_project", "use_wandb", "report_to", "logger", "swanlab", "mlflow", "tensorboard_dir"),
            "remove it: metrics are always written to run_dir/metrics.jsonl and run_dir/tensorboard",
        ),
        **dict.fromkeys(
            ("dp", "dp_size", "data_parallel_size", "n_gpus_per_node", "nnodes", "num_gpus", "world_size"),
            "remove it: torchrun or scripts/launch.sh sets the number of ranks; those beyond "
            "parallel.tensor x pipeline x context are data-parallel",
        ),
        "gradient_accumulation_steps": "remove it: it follows from rollout.prompts_per_step, rollout.group_size, "
        "optimizer.minibatches and optimizer.micro_batch_size",
        "num_iterations": "set optimizer.minibatches; a rollout is learned from once",
        "ppo_epochs": "set optimizer.minibatches; a rollout is learned from once",
    }
)
"""Fixes for names without a counterpart."""
_ALIASES = {"epochs": ("total_epochs", "num_epochs", "num_train_epochs", "num_epoch")}
_NOTES = {**NOTE_ON, **{other: NOTE_ON[name] for name, others in _ALIASES.items() for other in others}}

_IN_SECTION: Mapping[str, str] = MappingProxyType(
    {
        "objective.contrast": "remove it: this version has no second teacher with another problem's context",
        "sglang.sink": "rollout.sglang.transport",  # the field's name in version 0.1
        "eval.n": "eval.samples",
        "eval.interval": "eval.every",
        "eval.batch_size": "rollout.batch_size",
        "checkpoint.interval": "checkpoint.every",
        "checkpoint.async": "checkpoint.asynchronous",
        "optimizer.batch_size": "optimizer.micro_batch_size",
        "parallel.sequence_parallel": "parallel.sequence",
        "rollout.tp": "rollout.sglang.tensor",
        "rollout.tensor": "rollout.sglang.tensor",
        "rollout.tensor_parallel_size": "rollout.sglang.tensor",
        "rollout.tensor_model_parallel_size": "rollout.sglang.tensor",
        "reward.type": "reward.verifier",
        "reward.name": "reward.verifier",
        "model.name": "model.path",
        "optimizer.optimizer": "remove it: the optimizer is AdamW",
        "optimizer.type": "remove it: the optimizer is AdamW",
        "optimizer.name": "remove it: the optimizer is AdamW",
        "rollout.top_k": "remove it: responses are sampled from the whole vocabulary",
    }
)
"""Counterparts and fixes by the last two parts of a name, which take precedence over `FIELD_OF`."""


def translate(path: Sequence[str]) -> str | None:
    """Fix for a key of another framework, such as ("actor_rollout_ref", "rollout", "n"); None for an unknown name."""
    name = normal(path[-1])
    special = _IN_SECTION.get(".".join([normal(path[-2]), name])) if len(path) > 1 else None
    found = special or FIELD_OF.get(name)
    if found is None:
        return _NOTES.get(name)
    return found if found.startswith("remove") else f"use {found}"


def normal(name: str) -> str:
    """Name in lower case with underscores, without leading dashes."""
    return name.strip("-+ ").replace("-", "_").lower()
