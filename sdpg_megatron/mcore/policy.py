"""Passes over the trained model on this rank: everything that SDPG computes from its weights, without an optimizer.

All ranks of a replica must call every method with the same micro-batches, and all replicas with the same number of
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import NonFiniteWeightsError
from sdpg_megatron.mcore import passes
from sdpg_megatron.mcore.compat import device
from sdpg_megatron.mcore.forward_step import ForwardStep
from sdpg_megatron.mcore.frozen_weights import FrozenWeights
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.mcore.model import first_non_finite, named_parameters
from sdpg_megatron.mcore.optimizer import gather_parameters
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.mcore.routing import Routing
from sdpg_megatron.mcore.teachers import Teacher, build_teacher
from sdpg_megatron.objectives import passes_of_run
from sdpg_megatron.objectives.base import Objective, StepContext
from sdpg_megatron.records import MicroBatch


class Policy:
    """Model chunks of this rank, with the head, the teacher and the reference of a run.

    `PolicyTrainer` adds an optimizer. A host program that owns model and optimizer uses this class alone.
    """

    def __init__(
        self,
        config: RunConfig,
        arch: Architecture,
        objective: Objective,
        ranks: ParallelState,
        chunks: Sequence[nn.Module],
        *,
        gathers_late: bool,
        initial: FrozenWeights | None = None,
    ) -> None:
        """
        Args:
            chunks: this rank's chunks of the model, wrapped in Megatron's DDP.
            gathers_late: True if Megatron gathers updated weights in the next forward pass (`overlap_param_gather`).
            initial: weights of `config.model.path`, if `needs_initial`; None: the chunks have them now.
        """
        self.arch, self.ranks, self.objective = arch, ranks, objective
        self.chunks: list[Any] = list(chunks)
        self.device = device.training_device()
        self._minibatches = config.optimizer.minibatches
        self._gradient_every = config.alarms.gradient_every
        self._gathers_late = gathers_late
        self._gathered = not gathers_late
        """True if the weights are complete on this rank and no later pass gathers them."""
        self.gather()  # loaded weights are complete, but Megatron would gather them in the first pass
        self.routing = Routing(self.chunks, config.model, arch.num_layers)
        self.head = Head.build(config, arch.vocab_size, ranks.tensor_group, self.chunks)
        required_passes = passes_of_run(objective, config.total_optimizer_steps)
        if initial is None and needs_initial(config, objective):
            initial = FrozenWeights(self.chunks)
        self._reference = initial if required_passes.reference else None
        # With teacher log-probs only, all teacher passes run before the first update: no copy of the weights is needed.
        updates = self._minibatches if required_passes.teacher else 1
        self.teacher = (
            build_teacher(config.objective, self.chunks, initial, updates)
            if required_passes.privileged
            else Teacher(self.chunks)
        )

    def gather(self) -> None:
        """Gather the weights if `overlap_param_gather` has left them sharded. Collective over data-parallel ranks.

        Call before weights are read between mini-batches, except in the training pass. Forward-only passes need it too:
        they would gather layer by layer, and some ranks may have no micro-batch to run.
        """
        if not self._gathered:
            gather_parameters(self.chunks)
            self._gathered = True

    def updated(self) -> None:
        """Record that an optimizer step, or a skipped one, followed the last pass."""
        self._gathered = not self._gathers_late

    @property
    def minibatches(self) -> int:
        """Optimizer steps per rollout step."""
        return self._minibatches

    def named_weights(self) -> dict[str, Tensor]:
        """This rank's weight shards by global Megatron name: live storage, not copies."""
        assert self._gathered, "weights are read between rollout steps"
        return {name: parameter.data for name, parameter in named_parameters(self.chunks)}

    def with_reference(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the reference model's log-probs to the micro-batches."""
        assert self._reference is not None, "the objective has no reference term"
        self.gather()
        with self._reference.swapped_in(self.chunks):
            found = passes.logprobs(self.chunks, batches, self.head)
        return [dataclasses.replace(b, reference_logprobs_T=x) for b, x in zip(batches, found, strict=True)]

    def with_old_logprobs(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the current weights' log-probs as the old log-probs of later mini-batches."""
        self.gather()
        with self.routing.step(batches) as numbered:
            found = passes.logprobs(self.chunks, numbered, self.head)
        return [dataclasses.replace(b, old_logprobs_T=x) for b, x in zip(batches, found, strict=True)]

    def begin(self, step: int) -> None:
        """Begin training on rollout step `step`. Call once, before its passes and updates."""
        self.teacher.begin(step)

    def with_early_teacher(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the hidden rows of an early teacher (see `Teacher.early`), in host memory; no-op for other teachers."""
        return self._with_teacher(batches) if self.teacher.early else list(batches)

    def with_late_teacher(self, batches: Sequence[MicroBatch], context: StepContext) -> list[MicroBatch]:
        """Add the hidden rows of a teacher that is not early; no-op if the step needs none."""
        needed = self.objective.required_passes(context).teacher and not self.teacher.early
        return self._with_teacher(batches) if needed else list(batches)

    def _with_teacher(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        self.gather()
        return self.teacher.with_rows(batches)

    def with_teacher_logprobs(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Add the teacher's log-probs of the sampled tokens at open gates. Call before the rollout step's updates."""
        self.gather()
        return self.teacher.with_logprobs(batches, self.head)

    def forward_step(self, context: StepContext) -> ForwardStep:
        """Forward step of the training pass of one optimizer step."""
        teacher = self.objective.required_passes(context).teacher
        return ForwardStep(
            self.objective,
            context,
            self.head,
            self.teacher.matrix() if teacher else None,
            context_group=self.ranks.context_group if self.ranks.context_size > 1 else None,
            measure_gradient_ratio=teacher and bool(self._gradient_every) and context.step % self._gradient_every == 0,
        )

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


def needs_initial(config: RunConfig, objective: Objective) -> bool:
    """True if the run reads the weights of `config.model.path` after the first update: a reference, or that teacher.

    A resumed run reads them from the same folder.
    """
    required_passes = passes_of_run(objective, config.total_optimizer_steps)
    return required_passes.reference or (required_passes.privileged and config.objective.teacher == "initial")
