"""Hooks of slime's actors: the passes before each training step, and the loss.

slime loads each hook by its path and passes no object of this package, so their common state is `_TRAINER`.

Shapes: B sequences, S packed tokens of this rank, H hidden size, T response tokens of a micro-batch on this rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from sdpg_megatron.batching.collate import PackingLayout
from sdpg_megatron.batching.step_batch import with_corrections
from sdpg_megatron.data.tokenizer import stop_ids
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.mcore.compat.device import training_device
from sdpg_megatron.mcore.forward_step import ForwardStep
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.mcore.optimizer import gather_parameters
from sdpg_megatron.mcore.teachers import build_teacher
from sdpg_megatron.mcore.transfer import to_device
from sdpg_megatron.objectives import StepContext, build_objective, passes_of_run
from sdpg_megatron.plugins.batch import token_weights, with_tokens
from sdpg_megatron.plugins.hidden import HiddenOutput
from sdpg_megatron.plugins.report import weighted_sums
from sdpg_megatron.plugins.slime.rollout import SlimeRollout, read_rollout
from sdpg_megatron.plugins.slime.samples import SHIPPED_AS
from sdpg_megatron.plugins.slime.settings import PATHS, flag, read_settings
from sdpg_megatron.records import MicroBatch

ROUTING_STAGE = "ROUTING_REPLAY_STAGE"
"""Environment variable that tells slime's routers which experts to select."""


# --- functions that slime calls


def check_arguments(args: Any) -> None:
    """Check the configuration before the model is built (``--custom-megatron-init-path``, optional).

    Raises:
        ConfigError: see `read_settings`.
    """
    read_settings(args)


def postprocess(args: Any, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Take the teacher's prompts out of the training data (``--rollout-data-postprocess-path``).

    Raises:
        ConfigError: see `read_settings`; or the prompts are missing.
        DataError: see `read_rollout`.
    """
    _TRAINER.begin(args, rollout_id, rollout_data)


def before_train_step(
    args: Any, rollout_id: int, step_id: int, model: Sequence[nn.Module], optimizer: Any, scheduler: Any
) -> None:
    """Run the teacher's pass, then make the model return hidden states.

    For ``--custom-megatron-before-train-step-hook-path``.

    Raises:
        ConfigError: the model's logits are not the product of its hidden states and output weight.
    """
    if getattr(model[0], "role", "actor") != "critic":
        _TRAINER.prepare(args, rollout_id, step_id, model)


def before_log_prob(args: Any, model: Sequence[nn.Module], store_prefix: str) -> None:
    """Make the model return logits again (``--custom-megatron-before-log-prob-hook-path``)."""
    _TRAINER.restore()


def loss(
    args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a micro-batch under slime's own reducer, and metrics (``--custom-loss-function-path``).

    Args:
        logits: last hidden states [1, S, H], which the model returns since `before_train_step`.
    """
    return _TRAINER.loss(args, batch, logits, sum_of_sample_mean)


# --- their state


class _Run:
    """Configuration and objective."""

    def __init__(self, args: Any) -> None:
        self.settings = read_settings(args)
        config = self.settings.config
        self.objective = build_objective(config.objective, config.total_optimizer_steps)
        self.undistilled: tuple[int, ...] = ()
        if not config.objective.distill_stop_tokens:
            self.undistilled = stop_ids(Path(args.hf_checkpoint), args.padded_vocab_size)
        multiple = args.data_pad_size_multiplier * parallel_state.get_tensor_model_parallel_world_size()
        self.layout = PackingLayout(
            multiple=multiple,
            context=parallel_state.get_context_parallel_rank(),
            context_size=parallel_state.get_context_parallel_world_size(),
        )

    def context(self, rollout_id: int, step: int) -> StepContext:
        """Context of a training step; `distill_scale` is not set."""
        settings = self.settings
        return StepContext(rollout_id * settings.minibatches + step, settings.config.total_optimizer_steps)


class _Model:
    """Chunks of the actor's model on this rank, with the head and the teacher."""

    def __init__(self, args: Any, run: _Run, chunks: Sequence[nn.Module]) -> None:
        config, self.chunks = run.settings.config, list(chunks)
        group = parallel_state.get_tensor_model_parallel_group()
        self.head = Head.build(config, run.settings.vocab_size(args), group, self.chunks)
        self.output = HiddenOutput(self.chunks)
        needed = passes_of_run(run.objective, config.total_optimizer_steps)
        # Teacher log-probs are computed before the first update: no copy of the output matrix is needed.
        self.teacher = build_teacher(
            config.objective, self.chunks, None, run.settings.minibatches if needed.teacher else 1
        )


@contextmanager
def _free_routing() -> Iterator[None]:
    """Let routers choose the experts during a pass. slime replays those of the student's tokens."""
    before = os.environ.get(ROUTING_STAGE)
    if before is None:
        yield
        return
    os.environ[ROUTING_STAGE] = "fallthrough"
    try:
        yield
    finally:
        os.environ[ROUTING_STAGE] = before


class SlimeTrainer:
    """SDPG in one actor process of slime. All ranks of a replica call every method but `loss` together."""

    def __init__(self) -> None:
        self._run: _Run | None = None
        self._model: _Model | None = None
        self._rollout: SlimeRollout | None = None
        self._batches: list[list[MicroBatch]] = []
        """Micro-batches of each step of the rollout, with the tensors of passes before its first update."""
        self._pending: dict[int, MicroBatch] = {}
        """Micro-batches of the current step that have no loss yet, by their first sample's key."""
        self._forward_step: ForwardStep | None = None

    def begin(self, args: Any, rollout_id: int, data: dict[str, Any]) -> None:
        """See `postprocess`."""
        run = self._run = self._run or _Run(args)
        prompts, steps = data.pop(SHIPPED_AS, None), len(data["num_microbatches"])
        if prompts is None:
            raise _missing_call(args, "custom_convert_samples_to_train_data_path")
        if steps != run.settings.minibatches:
            expected = f"{run.settings.minibatches} steps in every rollout, as the schedules count them"
            fix = "return rollout_batch_size x n_samples_per_prompt samples from the rollout function"
            raise ConfigError(f"rollout {rollout_id}", f"{steps} training steps", expected, fix)
        self._batches = []
        self._rollout = read_rollout(
            data,
            prompts,
            run.layout,
            distill_enabled=run.objective.distill_enabled,
            stop_ids=run.undistilled,
            per_token=args.calculate_per_token_loss,
            vocab_size=args.padded_vocab_size,
        )

    def prepare(self, args: Any, rollout_id: int, step: int, chunks: Sequence[nn.Module]) -> None:
        """See `before_train_step`."""
        run, rollout = self._run, self._rollout
        if run is None or rollout is None:
            raise _missing_call(args, "rollout_data_postprocess_path")
        model = self._model = self._model or _Model(args, run, chunks)
        model.output.restore()
        if step and getattr(args, "overlap_param_gather", False):
            # Forward-only passes would gather layer by layer, and some ranks may have no micro-batch to run.
            gather_parameters(model.chunks)  # type: ignore[arg-type]
        if not self._batches:
            model.teacher.begin(rollout_id)
            steps = range(run.settings.minibatches)
            self._batches = [_begin_step(run, model, rollout, n, run.context(rollout_id, n)) for n in steps]
        batches, self._batches[step] = self._batches[step], []
        context = run.context(rollout_id, step)
        needed = run.objective.required_passes(context)
        if needed.teacher and not model.teacher.early:
            with _free_routing():
                batches = model.teacher.with_rows(batches)
        if needed.privileged and run.settings.config.objective.distill_average == "gated":
            context = replace(context, distill_scale=rollout.distill_scale(step, training_device()))
        group = parallel_state.get_context_parallel_group() if run.layout.context_size > 1 else None
        matrix_VH = model.teacher.matrix() if needed.teacher else None
        self._forward_step = ForwardStep(run.objective, context, model.head, matrix_VH, context_group=group)
        keys = [rollout.keys[indices[0]] for indices in rollout.micro_batches[step]]
        self._pending = dict(zip(keys, batches, strict=True))
        if step == run.settings.minibatches - 1:
            self._rollout = None
        model.output.install()

    def restore(self) -> None:
        """See `before_log_prob`."""
        if self._model is not None:
            self._model.output.restore()

    def loss(
        self, args: Any, batch: Mapping[str, Any], hidden_BSH: Tensor, reducer: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See the function `loss`."""
        run, model, forward_step = self._run, self._model, self._forward_step
        micro_batch = self._pending.pop(id(batch["unconcat_tokens"][0]), None)
        if run is None or model is None or forward_step is None or micro_batch is None:
            raise _missing_call(args, "custom_megatron_before_train_step_hook_path")
        model.output.check(hidden_BSH)
        weights_T = token_weights(reducer, micro_batch.num_tokens, hidden_BSH.device)
        rollout_T = _joined(batch, "rollout_log_probs")
        micro_batch = with_tokens(
            micro_batch,
            advantages_T=_joined(batch, "advantages"),
            weights_T=weights_T,
            old_logprobs_T=rollout_T if args.use_rollout_logprobs else _joined(batch, "log_probs"),
            reference_logprobs_T=_joined(batch, "ref_log_probs"),
            rollout_logprobs_T=rollout_T,
        )
        if run.settings.config.objective.correction != "none":
            (micro_batch,) = with_corrections([micro_batch], run.settings.config.objective, forward_step.context_group)
        total, metrics = forward_step.loss_and_metrics(micro_batch, model.chunks[-1], hidden_BSH)
        # "train/loss" has the weights already; without the rollout's log-probs there is nothing to compare with.
        known = {
            name.removeprefix("train/"): metric
            for name, metric in metrics.items()
            if name != "train/loss" and (rollout_T is not None or not name.startswith("rollout/"))
        }
        return total, {"loss": total.detach(), **weighted_sums(known, weights_T)}


def _begin_step(run: _Run, model: _Model, rollout: SlimeRollout, step: int, context: StepContext) -> list[MicroBatch]:
    """Micro-batches of a step with the tensors that need the weights before the rollout's first update."""
    needed = run.objective.required_passes(context)
    batches = to_device(rollout.collated(step, run.layout, teacher=needed.privileged), training_device())
    with _free_routing():
        if needed.teacher and model.teacher.early:
            batches = model.teacher.with_rows(batches)
        return model.teacher.with_logprobs(batches, model.head) if needed.teacher_logprob else batches


def _joined(batch: Mapping[str, Any], key: str) -> Tensor | None:
    """Per-token values of a micro-batch, float32 [T]; None if slime has none."""
    values: Sequence[Tensor] | None = batch.get(key)
    return None if values is None else torch.cat(list(values)).float()


def _missing_call(args: Any, argument: str) -> ConfigError:
    """The function of an argument has not been called for the current rollout, training step or micro-batch."""
    expected = f"{PATHS[argument]}, or a function that calls it once for each of slime's calls"
    return ConfigError(flag(argument), getattr(args, argument, None), expected, "correct the path or the function")


_TRAINER = SlimeTrainer()
