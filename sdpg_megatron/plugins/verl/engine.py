"""verl's Megatron engine with SDPG's training pass.

Only the training pass differs: its forward and backward passes over a mini-batch. Model, optimizer, checkpoints,
weight export and forward-only calls are verl's. Works with verl 0.9.1 and its main branch of August 2026.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdpg_megatron.batching.collate import PackingLayout
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.tokenizer import stop_ids
from sdpg_megatron.errors import ConfigError, NonFiniteLossError
from sdpg_megatron.mcore import parallel, passes
from sdpg_megatron.mcore.compat.device import training_device
from sdpg_megatron.mcore.forward_step import NONFINITE, ForwardStep, Report, hidden_states, read_reports, reduce_tokens
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.mcore.optimizer import gather_parameters
from sdpg_megatron.mcore.teachers import Teacher
from sdpg_megatron.mcore.transfer import to_device
from sdpg_megatron.objectives import StepContext, build_objective
from sdpg_megatron.observe.metrics import Metric, merge, values
from sdpg_megatron.plugins.batch import host_batch, local_tokens, token_weights
from sdpg_megatron.plugins.verl.rows import HostRows, count_tokens, read_rows, uniform_temperature
from sdpg_megatron.plugins.verl.settings import actor_config, check_actor, check_engine, read_settings
from sdpg_megatron.records import MicroBatch

logger = logging.getLogger(__name__)

_engines: Any = importlib.import_module("verl.workers.engine.megatron")
_core_algorithms: Any = importlib.import_module("verl.trainer.ppo.core_algos")
_engine_utils: Any = importlib.import_module("verl.workers.engine.utils")
_metric: Any = importlib.import_module("verl.utils.metric")
_tensordicts: Any = importlib.import_module("verl.utils.tensordict_utils")


def registry() -> Any:
    """verl's registry of engines."""
    return importlib.import_module("verl.workers.engine.base").EngineRegistry


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sizes of a mini-batch over all data-parallel ranks."""

    response_tokens: int
    all_tokens: int
    data_size: int
    sequences: int | None
    """verl's ``global_batch_size``."""

    @property
    def scale(self) -> float:
        """Sum of a `MicroBatch`'s weights over that of verl's: theirs sum to the number of data-parallel ranks."""
        return max(self.response_tokens, 1) / self.data_size


class SDPGEngine(_engines.MegatronEngineWithLMHead):  # type: ignore[misc]
    """Engine of verl's actor that trains with an objective of this package.

    A reference worker may use it too: forward-only calls run verl's own code.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        """
        Raises:
            ConfigError: the configuration of SDPG is missing or invalid, or verl's has settings that cannot work.
        """
        self._run: RunConfig | None = None
        if not engine_config.forward_only:
            check_engine(engine_config, model_config)
            self._run = read_settings(optimizer_config.total_training_steps, str(model_config.local_path))
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self._head: Head | None = None
        if self._run is not None and dist.get_rank() == 0:
            # A warning, as verl shows no others by default: without this line verl's own engine trains.
            given = self._run.objective
            logger.warning("SDPG trains the actor: %s, beta %g, alpha %g", given.name, given.beta, given.alpha)

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> dict[str, Any]:
        """Forward and backward passes over a mini-batch; the teacher's pass runs first, if the step needs it.

        Args:
            data: TensorDict of verl's actor update; `rows.TEACHER_KEY` names the field that SDPG needs in addition.
            loss_function: verl's PPO loss, read for its configuration only.

        Returns:
            On the last pipeline stage verl's mapping with the losses of the micro-batches and the metrics, else an
            empty one.

        Raises:
            ConfigError: verl's loss has terms that the objective does not have, or the objective needs log-probs of
                the reference that verl did not compute.
            DataError: teacher prompts are missing.
            NonFiniteLossError: on every rank, if a loss is not finite.
        """
        if forward_only:
            found: dict[str, Any] = super().forward_backward_batch(data, loss_function, forward_only=True)
            return found
        assert self._run is not None, "not forward-only"
        actor = actor_config(loss_function)
        check_actor(actor, self._run)
        objective = build_objective(self._run.objective, self._run.steps)
        # verl's schedule of the learning rate is in its checkpoints and advances once per rollout.
        context = StepContext(int(self.lr_scheduler.num_steps), self._run.steps)
        needed, totals = objective.required_passes(context), self._totals(data)
        if needed.reference and "ref_log_prob" not in data:
            fix = "set actor_rollout_ref.actor.use_kl_loss to True, or objective.alpha to 0"
            raise ConfigError("objective.alpha", self._run.objective.alpha, "0 without a reference worker", fix)
        _tensordicts.assign_non_tensor(data, sp_size=self.engine_config.context_parallel_size)
        parts, _ = _engine_utils.prepare_micro_batches(data=data, dp_group=self.get_data_parallel_group())
        read = functools.partial(read_rows, objective=objective, distills=needed.teacher, stop_ids=self._stop_ids)
        built = [self._micro_batch(read(part), actor, totals, reference=needed.reference) for part in parts]
        batches = passes.full_rounds(self.module, to_device(built, training_device()))
        if needed.teacher:
            batches = self._with_teacher(batches)
        ranks = parallel.current()
        step = ForwardStep(
            objective,
            context,
            self._head_at(uniform_temperature(data)),
            context_group=ranks.context_group if ranks.context_size > 1 else None,
        )
        run = functools.partial(self._sdpg_forward_step, step, totals, len(batches))
        return self._outputs(passes.run_schedule(self.module, run, batches), ranks, context)

    def _totals(self, data: Any) -> _Totals:
        counts = torch.tensor(count_tokens(data), device=training_device())
        dist.all_reduce(counts, group=self.get_data_parallel_group())
        sequences = _tensordicts.get_non_tensor_data(data, key="global_batch_size", default=None)
        response_tokens, all_tokens = counts.tolist()
        return _Totals(response_tokens, all_tokens, self.get_data_parallel_size(), sequences)

    @functools.cached_property
    def _stop_ids(self) -> Sequence[int]:
        assert self._run is not None, "not forward-only"
        if self._run.objective.distill_stop_tokens:
            return ()
        return stop_ids(Path(self.model_config.local_path), self.model_config.hf_config.vocab_size)

    def _micro_batch(self, rows: HostRows, actor: Any, totals: _Totals, *, reference: bool) -> MicroBatch:
        def reduced(values_T: Tensor) -> Tensor:
            """verl's loss from the loss of each token."""
            losses_BN = torch.zeros(rows.mask_BN.shape).masked_scatter(rows.mask_BN, values_T)
            loss: Tensor = _core_algorithms.agg_loss(
                losses_BN,
                rows.mask_BN,
                actor.loss_agg_mode,
                dp_size=totals.data_size,
                batch_num_tokens=max(totals.response_tokens, 1),
                global_batch_size=totals.sequences,
                loss_scale_factor=actor.loss_scale_factor,
            )
            return loss

        weights_T = token_weights(reduced, int(rows.mask_BN.sum())) * totals.scale
        given = {**rows.tokens, "weights_T": weights_T}
        if not reference:
            given.pop("reference_logprobs_T", None)
        here = local_tokens(*rows.lengths, self._layout)[rows.predicted_A]
        return host_batch(rows.samples, self._layout, **{name: values_T[here] for name, values_T in given.items()})

    @functools.cached_property
    def _layout(self) -> PackingLayout:
        engine, ranks = self.engine_config, parallel.current()
        return PackingLayout(
            packed=bool(engine.use_remove_padding),
            multiple=ranks.tensor_size if engine.sequence_parallel else 1,
            context=ranks.context,
            context_size=ranks.context_size,
        )

    def _with_teacher(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        if any(getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False) for chunk in self.module):
            gather_parameters(self.module)  # some ranks may have no teacher sequence to gather them for
        return Teacher(self.module).with_rows(batches)

    def _head_at(self, temperature: float) -> Head:
        if self._head is None:
            assert self._run is not None, "not forward-only"
            vocab_size = self.model_config.hf_config.vocab_size
            self._head = Head.build(self._run, vocab_size, parallel.current().tensor_group, self.module)
        return replace(self._head, options=replace(self._head.options, temperature=temperature))

    def _sdpg_forward_step(
        self, step: ForwardStep, totals: _Totals, count: int, data: Iterator[MicroBatch], model: nn.Module
    ) -> tuple[Tensor, Any]:
        batch = next(data)
        return hidden_states(model, batch.student), functools.partial(self._loss, step, totals, count, batch, model)

    def _loss(
        self, step: ForwardStep, totals: _Totals, count: int, batch: MicroBatch, model: nn.Module, hidden_BSH: Tensor
    ) -> tuple[Any, ...]:
        """Loss in the form that Megatron expects under verl's configuration, and the result of this micro-batch."""
        loss_sum, metrics = step.loss_and_metrics(batch, model, hidden_BSH)
        loss = loss_sum / totals.scale
        result = loss.detach(), {name: reduce_tokens(metric) for name, metric in metrics.items()}
        if not self.tf_config.calculate_per_token_loss:
            return loss * count, result  # Megatron divides by the number of micro-batches
        # Megatron divides by the sum of the counts; with those of all tokens, as its routers' losses need.
        tokens = torch.tensor(self._share(batch), dtype=torch.int, device=loss.device)
        return loss * (totals.all_tokens / totals.data_size), tokens, result

    def _share(self, batch: MicroBatch) -> int:
        """This context-parallel rank's share of the micro-batch's tokens; the shares sum to their number."""
        assert batch.student.sizes_Q is not None, "of `collate`"
        whole, rest = divmod(int(batch.student.sizes_Q.sum()), self._layout.context_size)
        return whole + (self._layout.context < rest)

    def _outputs(
        self, results: list[tuple[Tensor, Report]], ranks: parallel.ParallelState, context: StepContext
    ) -> dict[str, Any]:
        """Losses and metrics in verl's form. Collective over all ranks."""
        # Tensor-parallel ranks compute the same numbers: only one reports them, or sums would count twice.
        local = merge(read_reports([report for _, report in results])) if ranks.tensor == 0 else {}
        merged = merge(ranks.gather_all(local))
        if merged.get(NONFINITE, Metric(0.0)).value:
            raise NonFiniteLossError(context.step, int(merged[NONFINITE].value))
        if not results:
            return {}
        losses = torch.stack([loss for loss, _ in results])
        if ranks.context_size > 1:
            dist.all_reduce(losses, group=ranks.context_group)
        # The values are those of all ranks, so verl's mean over data-parallel ranks keeps them.
        metrics = {name: _metric.Metric("mean", value) for name, value in values(merged).items()}
        return {"model_output": {}, "loss": losses.tolist(), "metrics": metrics}
