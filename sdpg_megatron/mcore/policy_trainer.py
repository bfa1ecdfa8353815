"""The trained model on this rank: passes and optimizer steps over micro-batches.

All ranks of a replica must call every method with the same micro-batches, and all replicas with the same number of
them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import NonFiniteWeightsError
from sdpg_megatron.mcore import passes
from sdpg_megatron.mcore.compat import device
from sdpg_megatron.mcore.forward_step import NONFINITE, ForwardStep, read_reports
from sdpg_megatron.mcore.frozen_weights import FrozenWeights
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.mcore.model import build_chunks, first_non_finite, load_weights, named_parameters
from sdpg_megatron.mcore.offload import OffloadedState
from sdpg_megatron.mcore.optimizer import build_optimizer, build_scheduler, gather_parameters, ready_gradients, wrap
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.mcore.routing import Routing
from sdpg_megatron.mcore.teachers import Teacher, build_teacher
from sdpg_megatron.mcore.transfer import host_copy
from sdpg_megatron.objectives import passes_of_run
from sdpg_megatron.objectives.base import Objective, RequiredPasses, StepContext
from sdpg_megatron.objectives.gradient_balance import gradient_ratio
from sdpg_megatron.objectives.mismatch import effective_sample_size
from sdpg_megatron.observe.metrics import Metric, Reduction, merge
from sdpg_megatron.records import MicroBatch

SKIPPED = "optimizer/skipped"
"""Metric: number of optimizer steps skipped because loss or gradient was not finite."""


class PolicyTrainer:
    """Model chunks, optimizer and schedule of this rank, with the weights of `config.model.path`."""

    def __init__(self, config: RunConfig, arch: Architecture, objective: Objective, ranks: ParallelState) -> None:
        self.arch = arch
        chunks = build_chunks(self.arch, config.model, config.parallel, ranks)
        load_weights(chunks, config.model.path, self.arch, ranks)
        self.ranks = ranks
        self.objective = objective
        self._gradient_every = config.alarms.gradient_every
        self.device = device.training_device()
        self.chunks = wrap(chunks, config.optimizer)
        self._minibatches = config.optimizer.minibatches
        self._gathers_late = config.optimizer.overlap_param_gather
        self._gathered = not self._gathers_late
        """True if the weights are complete on this rank and no later pass gathers them (`overlap_param_gather`)."""
        self._gather()  # the loaded weights are complete, but Megatron would gather them in the first forward pass
        self.routing = Routing(self.chunks, config.model, arch.num_layers)
        self.optimizer: Any = build_optimizer(self.chunks, config.optimizer)
        self._offloaded = OffloadedState(self.optimizer, self.chunks)
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, config.total_optimizer_steps)
        self.head = Head.build(config, self.arch.vocab_size, ranks.tensor_group, self.chunks)
        required_passes = passes_of_run(objective, config.total_optimizer_steps)
        # Weights of the model folder. A resumed run reads them from the same folder.
        kept = required_passes.reference or (required_passes.privileged and config.objective.teacher == "initial")
        initial = FrozenWeights(self.chunks) if kept else None
        self._reference = initial if required_passes.reference else None
        # With teacher log-probs only, all teacher passes run before the first update: no copy of the weights is needed.
        updates = self._minibatches if required_passes.teacher else 1
        self.teacher = (
            build_teacher(config.objective, self.chunks, initial, updates)
            if required_passes.privileged
            else Teacher(self.chunks)
        )

    def _gather(self) -> None:
        """Gather the weights if `overlap_param_gather` has left them sharded. Collective over data-parallel ranks.

        Call before weights are read between mini-batches, except in the training pass. Forward-only passes need it too:
        they would gather layer by layer, and some ranks may have no micro-batch to run.
        """
        if not self._gathered:
            gather_parameters(self.chunks)
            self._gathered = True

    def offload(self) -> None:
        """Move the optimizer state to the host and free the gradient buffers, until `onload`."""
        cuda = self.device.type == "cuda"
        for chunk in self.chunks:
            chunk.offload_grad_buffers(synchronize=cuda, empty_cache=False)
        self._offloaded.offload()
        if cuda:
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Undo `offload`, with gradients 0. No-op if not offloaded."""
        cuda = self.device.type == "cuda"
        for chunk in self.chunks:
            chunk.restore_grad_buffers(synchronize=cuda)
        self._offloaded.restore()

    def named_weights(self) -> dict[str, Tensor]:
        """This rank's weight shards by global Megatron name: live storage, not copies."""
        assert self._gathered, "weights are read between rollout steps"
        return {name: parameter.data for name, parameter in named_parameters(self.chunks)}

    def with_reference(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the reference model's log-probs to the micro-batches."""
        assert self._reference is not None, "the objective has no reference term"
        self._gather()
        with self._reference.swapped_in(self.chunks):
            found = passes.logprobs(self.chunks, batches, self.head)
        return [dataclasses.replace(b, reference_logprobs_T=x) for b, x in zip(batches, found, strict=True)]

    def with_old_logprobs(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the current weights' log-probs as the old log-probs of later mini-batches."""
        self._gather()
        with self.routing.step(batches) as numbered:
            found = passes.logprobs(self.chunks, numbered, self.head)
        return [dataclasses.replace(b, old_logprobs_T=x) for b, x in zip(batches, found, strict=True)]

    def begin(self, step: int) -> None:
        """Begin training on rollout step `step`. Call once, before its passes and updates."""
        self.teacher.begin(step)

    def with_early_teacher(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the hidden rows of an early teacher (see `Teacher.early`), in host memory; no-op for other teachers."""
        return self._with_teacher(batches) if self.teacher.early else list(batches)

    def _with_teacher(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the teacher's hidden rows under the privileged context."""
        self._gather()
        with self.teacher.reading():
            found = passes.teacher_hidden(self.chunks, batches)
        if self.teacher.early:
            found = [None if x is None else host_copy(x) for x in found]
        return [dataclasses.replace(b, teacher_hidden_GH=x) for b, x in zip(batches, found, strict=True)]

    def with_teacher_logprobs(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the teacher's log-probs of the sampled tokens at open gates. Call before the rollout step's updates."""
        self._gather()
        with self.teacher.reading():
            found = passes.teacher_logprobs(self.chunks, batches, self.head)
        return [dataclasses.replace(b, teacher_logprobs_T=x) for b, x in zip(batches, found, strict=True)]

    def update(self, batches: Sequence[MicroBatch], context: StepContext) -> dict[str, Metric]:
        """Run the teacher pass if still needed, then one optimizer step over the batch. Collective over all ranks.

        A step with a non-finite loss or gradient is skipped on all ranks: weights, optimizer, learning rate and teacher
        do not change. `SKIPPED` is then 1, and `NONFINITE` is the only other metric.

        Returns:
            The step's metrics, the same on every rank.

        Raises:
            NonFiniteWeightsError: on every rank, if the step made a weight infinite or NaN.
        """
        required_passes: RequiredPasses = self.objective.required_passes(context)
        if required_passes.teacher and not self.teacher.early:
            batches = self._with_teacher(batches)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        matrix_VH = self.teacher.matrix() if required_passes.teacher else None
        measure_gradient_ratio = (
            required_passes.teacher and bool(self._gradient_every) and context.step % self._gradient_every == 0
        )
        step = ForwardStep(
            self.objective,
            context,
            self.head,
            matrix_VH,
            context_group=self.ranks.context_group if self.ranks.context_size > 1 else None,
            measure_gradient_ratio=measure_gradient_ratio,
        )
        with self.routing.step(batches) as numbered:
            reports = passes.run_schedule(self.chunks, step, numbered)
        # Also after a skipped step: Megatron's next pass, of any kind, would gather the weights layer by layer.
        self._gathered = not self._gathers_late
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        grad_norm = ready_gradients(self.optimizer)
        # Tensor-parallel ranks compute the same numbers: only one reports them, or sums would count twice.
        local = merge(read_reports(reports)) if self.ranks.tensor == 0 else {}
        finite, found = zip(
            *self.ranks.gather_all((math.isfinite(grad_norm), {**local, **self.routing.metrics()})), strict=True
        )
        merged = merge(found)
        if all(finite):
            self._step()
            self.check_weights(f"after optimizer step {context.step}")
        if (context.step + 1) % self._minibatches == 0:
            self._gather()
        if not all(finite):
            return {SKIPPED: Metric(1.0, Reduction.SUM), NONFINITE: merged.get(NONFINITE, Metric(0.0, Reduction.SUM))}
        return {
            **merged,
            **effective_sample_size(merged),
            **gradient_ratio(merged),
            "optimizer/grad_norm": Metric(grad_norm),
            "optimizer/lr": Metric(learning_rate),
            SKIPPED: Metric(0.0, Reduction.SUM),
        }

    def _step(self) -> None:
        """Update weights, learning rate and teacher from the clipped gradients."""
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        if self.teacher.follows_updates:
            self._gather()
        self.teacher.updated()

    def check_weights(self, when: str) -> None:
        """Check that every weight of the model is finite. Collective over all ranks.

        With `overlap_param_gather`, each weight is checked by the rank that updates it.

        Args:
            when: the time of the check, for the error message.

        Raises:
            NonFiniteWeightsError: on every rank, naming the first such tensor.
        """
        found = next(filter(None, self.ranks.gather_all(first_non_finite(self.chunks, self.arch))), None)
        if found is not None:
            raise NonFiniteWeightsError(when, found)

    @property
    def minibatches(self) -> int:
        """Optimizer steps per rollout step."""
        return self._minibatches

    @property
    def has_learned(self) -> bool:
        """True after the first optimizer step. Before it, there is no optimizer state to save."""
        return bool(self.scheduler.num_steps)
