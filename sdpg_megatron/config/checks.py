"""Checks across fields of a configuration."""

from __future__ import annotations

from collections.abc import Iterator

from sdpg_megatron.config import ObjectiveConfig, OptimizerConfig, ParallelConfig, RunConfig
from sdpg_megatron.config.external import is_external
from sdpg_megatron.config.method_defaults import TEACHERLESS, UNDISTILLED
from sdpg_megatron.config.server_checks import server_faults
from sdpg_megatron.errors import ConfigError


def check(config: RunConfig) -> None:
    """Check combinations of fields, without files or devices. Raises one `ConfigError` with all findings."""
    faults = [
        *_check_data(config),
        *_check_objective(config.objective),
        *_check_steps(config),
        *_check_rewards(config),
        *_check_parallel(config.parallel),
        *_check_packed(config),
        *_check_sampling(config),
        *server_faults(config.rollout.sglang),
        *_check_ahead(config),
        *_check_eval(config),
    ]
    if faults:
        raise ConfigError.joined(faults)


def _check_eval(config: RunConfig) -> Iterator[ConfigError]:
    evaluation, gym = config.eval, config.data.reasoning_gym
    if wrong := [k for k in evaluation.k if not 1 <= k <= evaluation.samples]:
        expected = f"1 to eval.samples ({evaluation.samples})"
        yield ConfigError("eval.k", wrong[0], expected, "draw more samples, or remove it")
    if evaluation.every and not (config.data.eval or gym.held_out):
        name = "data.reasoning_gym.held_out" if gym.tasks else "data.eval"
        yield ConfigError("eval.every", evaluation.every, f"0 without {name}", f"set {name}, or remove it")


def _check_data(config: RunConfig) -> Iterator[ConfigError]:
    data, gym = config.data, config.data.reasoning_gym
    if not gym.tasks:
        if gym.held_out:
            yield ConfigError("data.reasoning_gym.held_out", gym.held_out, "0 without tasks", "use data.eval")
        if config.reward.verifier == "reasoning_gym":
            expected = "another verifier: the prompts of files have no reasoning-gym task"
            yield ConfigError("reward.verifier", "reasoning_gym", expected, "set data.reasoning_gym.tasks")
        return
    for name, files in (("train", data.train), ("eval", data.eval)):
        if files:
            expected = "none where data.reasoning_gym.tasks has some"
            fix = "remove one of the two" if name == "train" else "use data.reasoning_gym.held_out"
            yield ConfigError(f"data.{name}", [str(file) for file in files], expected, fix)


def _check_objective(objective: ObjectiveConfig) -> Iterator[ConfigError]:
    if objective.divergence == "sampled_token" and objective.top_k:
        yield ConfigError("objective.top_k", objective.top_k, "null with sampled_token", "remove it")
    if objective.name in UNDISTILLED and objective.beta:
        expected = f"0 with {objective.name}, which has no distillation term"
        yield ConfigError("objective.beta", objective.beta, expected, "use sdpg")
    if objective.name in TEACHERLESS:
        for field, found, none in (("teacher", objective.teacher, "current"), ("context", objective.context, "data")):
            if found != none:
                expected = f"{none} with {objective.name}, which has no teacher"
                yield ConfigError(f"objective.{field}", found, expected, "remove it")
    if objective.name != "opsd" and not is_external(objective.name) and objective.distill_loss != "divergence":
        expected = f"divergence with {objective.name}"
        yield ConfigError("objective.distill_loss", objective.distill_loss, expected, "use opsd, or remove it")
    if objective.distill_loss == "clipped_ratio":
        yield from _check_clipped_ratio(objective)
    if objective.name == "rlsd" and objective.divergence != "sampled_token":
        expected = "sampled_token with rlsd, which uses no other token"
        yield ConfigError("objective.divergence", objective.divergence, expected, "remove it")


def _check_clipped_ratio(objective: ObjectiveConfig) -> Iterator[ConfigError]:
    """Refuse changed fields of the divergence, which `clipped_ratio` does not compute."""
    default = ObjectiveConfig(name=objective.name)
    for name in ("divergence", "jsd_beta", "top_k", "divergence_clip", "ratio_weighted_regularizers"):
        found, unset = getattr(objective, name), getattr(default, name)
        if found != unset:
            expected = f"{'null' if unset is None else unset} with objective.distill_loss clipped_ratio"
            yield ConfigError(f"objective.{name}", found, expected, "remove it: only the divergence reads it")


def _check_steps(config: RunConfig) -> Iterator[ConfigError]:
    objective, rollout, optimizer = config.objective, config.rollout, config.optimizer
    if rollout.prompts_per_step % optimizer.minibatches:
        yield ConfigError(
            "optimizer.minibatches",
            optimizer.minibatches,
            f"a divisor of rollout.prompts_per_step ({rollout.prompts_per_step})",
            "choose one that divides it",
        )
    if objective.policy == "reinforce" and optimizer.minibatches > 1:
        yield ConfigError(
            "objective.policy",
            "reinforce",
            f"ratio with {optimizer.minibatches} mini-batches: after the first, the samples are off-policy",
            "use ratio, or set optimizer.minibatches to 1",
        )
    ramp = (objective.beta_warmup_steps or 0) + (objective.beta_decay_steps or 0)
    if ramp > config.total_optimizer_steps:
        yield ConfigError(
            "objective.beta_warmup_steps + objective.beta_decay_steps",
            ramp,
            f"at most the run's {config.total_optimizer_steps} optimizer steps",
            "shorten them, or leave them null to have them scaled to the run",
        )
    if optimizer.warmup_steps > config.total_optimizer_steps:
        yield ConfigError(
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"at most the run's {config.total_optimizer_steps} optimizer steps",
            "shorten the warm-up",
        )
    yield from _check_overlap(optimizer)
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError("optimizer.min_lr", optimizer.min_lr, f"at most lr ({optimizer.lr})", "lower it")


def _check_overlap(optimizer: OptimizerConfig) -> Iterator[ConfigError]:
    if optimizer.overlap_param_gather and not (optimizer.distributed and optimizer.overlap_grad_reduce):
        needed = "overlap_grad_reduce" if optimizer.distributed else "distributed"
        expected = f"false without optimizer.{needed}"
        yield ConfigError("optimizer.overlap_param_gather", True, expected, f"set optimizer.{needed}, or remove it")
    if optimizer.bucket_size and not optimizer.overlap_grad_reduce:
        expected = "null without optimizer.overlap_grad_reduce: there is a single bucket then"
        yield ConfigError("optimizer.bucket_size", optimizer.bucket_size, expected, "remove it")


def _check_rewards(config: RunConfig) -> Iterator[ConfigError]:
    reward, selection, longest = config.reward, config.selection, config.rollout.max_response_tokens
    if reward.clip is not None and not reward.clip[0] < reward.clip[1]:
        yield ConfigError("reward.clip", reward.clip, "a lower and a higher bound", "for example [0, 1]")
    if reward.overlong_buffer is not None and reward.overlong_buffer > longest:
        expected = f"at most rollout.max_response_tokens ({longest})"
        yield ConfigError("reward.overlong_buffer", reward.overlong_buffer, expected, "lower it")
    if selection.oversample > 1 and not (selection.drop_dead or selection.filters):
        fix = "set selection.drop_dead or selection.filters, or remove it"
        yield ConfigError("selection.oversample", selection.oversample, "1 where no group is dropped", fix)


def _check_parallel(parallel: ParallelConfig) -> Iterator[ConfigError]:
    if parallel.virtual_pipeline and parallel.pipeline < 2:
        yield ConfigError(
            "parallel.virtual_pipeline",
            parallel.virtual_pipeline,
            "null where parallel.pipeline is 1",
            "remove it or raise parallel.pipeline",
        )
    if parallel.sequence and parallel.tensor == 1:
        yield ConfigError("parallel.sequence", True, "false where parallel.tensor is 1", "remove it")
    if max(parallel.expert_ranks, parallel.tensor) % min(parallel.expert_ranks, parallel.tensor):
        expected = f"a multiple or divisor of parallel.tensor ({parallel.tensor})"
        fix = "change parallel.expert_tensor, or leave it null"
        yield ConfigError("parallel.expert x parallel.expert_tensor", parallel.expert_ranks, expected, fix)
    if parallel.dispatcher == "allgather" and (parallel.expert_ranks > parallel.tensor or parallel.pipeline > 1):
        # The gather needs equal shapes, which data-parallel ranks do not have; megatron-core refuses it in a pipeline.
        expected = "alltoall with several pipeline stages, or experts over more ranks than parallel.tensor"
        yield ConfigError("parallel.dispatcher", "allgather", expected, "use alltoall")


def _check_packed(config: RunConfig) -> Iterator[ConfigError]:
    model = config.model
    if model.packed:
        if model.spec == "te" and model.dtype == "float32":
            # Context parallelism requires packed sequences, so this covers it, too.
            expected = "auto or local with model.dtype float32: Transformer Engine has no packed sequences in float32"
            yield ConfigError("model.spec", "te", expected, "set model.dtype to bfloat16, or remove it")
        return
    for field, found, none in (
        ("parallel.context", config.parallel.context, 1),
        ("optimizer.micro_batch_tokens", config.optimizer.micro_batch_tokens, None),
    ):
        if found != none:
            expected = f"{none or 'null'} where model.packed is false"
            yield ConfigError(field, found, expected, "remove model.packed: false, or this")


def _check_ahead(config: RunConfig) -> Iterator[ConfigError]:
    rollout = config.rollout
    if not rollout.ahead:
        return
    if config.objective.correction == "none":
        expected = "0 with objective.correction none: responses of older weights need importance weights"
        yield ConfigError("rollout.ahead", rollout.ahead, expected, "set objective.correction to truncate")
    if rollout.engine == "sglang" and rollout.sglang.colocated:
        expected = "0 where servers share the trainer's devices: their memory is in use by one of the two at a time"
        yield ConfigError("rollout.ahead", rollout.ahead, expected, "give the servers separate devices")
    if rollout.engine == "hf" and (config.model.recompute or config.parallel.sequence):
        expected = (
            "0 for the embedded engine with model.recompute or parallel.sequence: Megatron then resets torch's random "
            "generator while the engine samples from it"
        )
        yield ConfigError("rollout.ahead", rollout.ahead, expected, "generate on servers: rollout.engine=sglang")


def _check_sampling(config: RunConfig) -> Iterator[ConfigError]:
    if config.rollout.top_p != 1:
        expected = (
            "1: samples would come from a truncated distribution; the loss and the recorded log-probs use the whole one"
        )
        fix = "remove it; eval.top_p is for evaluations"
        yield ConfigError("rollout.top_p", config.rollout.top_p, expected, fix)
