"""The trained model on this rank, with its optimizer.

All ranks of a replica must call every method with the same micro-batches, and all replicas with the same number of
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore import passes
from sdpg_megatron.mcore.forward_step import NONFINITE, read_reports
from sdpg_megatron.mcore.model import build_chunks, load_weights
from sdpg_megatron.mcore.offload import OffloadedState
from sdpg_megatron.mcore.optimizer import build_optimizer, build_scheduler, ready_gradients, wrap
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.mcore.policy import Policy
from sdpg_megatron.objectives.base import Objective, StepContext
from sdpg_megatron.objectives.gradient_balance import gradient_ratio
from sdpg_megatron.objectives.mismatch import effective_sample_size
from sdpg_megatron.observe.metrics import Metric, Reduction, merge
from sdpg_megatron.records import MicroBatch

SKIPPED = "optimizer/skipped"
"""Metric: number of optimizer steps skipped because loss or gradient was not finite."""


class PolicyTrainer(Policy):
    """Model chunks, optimizer and schedule of this rank, with the weights of `config.model.path`."""

    def __init__(self, config: RunConfig, arch: Architecture, objective: Objective, ranks: ParallelState) -> None:
        bare = build_chunks(arch, config.model, config.parallel, ranks)
        load_weights(bare, config.model.path, arch, ranks)
        chunks = wrap(bare, config.optimizer)
        self.optimizer: Any = build_optimizer(chunks, config.optimizer)
        self._offloaded = OffloadedState(self.optimizer, chunks)
        self.scheduler = build_scheduler(self.optimizer, config.optimizer, config.total_optimizer_steps)
        late = config.optimizer.overlap_param_gather
        super().__init__(config, arch, objective, ranks, chunks, gathers_late=late)

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

    def update(self, batches: Sequence[MicroBatch], context: StepContext) -> dict[str, Metric]:
        """Run the teacher pass if still needed, then one optimizer step over the batch. Collective over all ranks.

        A step with a non-finite loss or gradient is skipped on all ranks: weights, optimizer, learning rate and teacher
        do not change. `SKIPPED` is then 1, and `NONFINITE` is the only other metric.

        Returns:
            The step's metrics, the same on every rank.

        Raises:
            NonFiniteWeightsError: on every rank, if the step made a weight infinite or NaN.
        """
        batches = self.with_late_teacher(batches, context)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        step = self.forward_step(context)
        with self.routing.step(batches) as numbered:
            reports = passes.run_schedule(self.chunks, step, numbered)
        self.updated()  # also after a skipped step: Megatron's next pass would gather the weights layer by layer
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
            self.gather()
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
            self.gather()
        self.teacher.updated()

    @property
    def has_learned(self) -> bool:
        """True after the first optimizer step. Before it, there is no optimizer state to save."""
        return bool(self.scheduler.num_steps)
