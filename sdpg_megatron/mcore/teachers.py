"""Teachers: the weights that read the privileged context.

These are the student's current weights, earlier ones, or a moving average. A teacher with other weights than the
student's also has another output matrix, with which the head computes the distributions of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.mcore import passes
from sdpg_megatron.mcore.frozen_weights import FrozenWeights
from sdpg_megatron.mcore.head import Head
from sdpg_megatron.mcore.model import output_weight
from sdpg_megatron.mcore.transfer import host_copy
from sdpg_megatron.records import MicroBatch


class Teacher:
    """`current`: the student's weights at each mini-batch. Base class of the others."""

    kind = "current"
    """Value of `ObjectiveConfig.teacher`."""
    early = False
    """Its rows for all mini-batches are computed before the first update of a rollout step."""
    follows_updates = False
    """`updated` reads the weights, which must be gathered first."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self.chunks = chunks
        (last,) = unwrap_model([chunks[-1]])
        self.output: nn.Parameter | None = output_weight(chunks[-1]) if last.post_process else None
        """The model's output matrix; None on stages without it."""

    @property
    def kept(self) -> list[Tensor]:
        """Tensors to save in a checkpoint, in host memory and in the order of the parameters; may be empty."""
        return []

    def begin(self, step: int) -> None:
        """Called after the rollout of step `step` and before its first update."""

    def updated(self) -> None:
        """Called after each optimizer step of the student."""

    def restart(self) -> None:
        """Copy the student's current weights. No-op for teachers without moving weights."""

    def reading(self) -> AbstractContextManager[None]:
        """Context in which the model computes with the teacher's weights."""
        return nullcontext()

    def matrix(self) -> Tensor | None:
        """This rank's shard of the output matrix for the teacher's rows; None: the student's current matrix."""
        return None

    def with_rows(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Run the teacher's pass, and add its hidden rows to the micro-batches; an early teacher's in host memory.

        The weights must be gathered; see `passes.teacher_hidden`.
        """
        with self.reading():
            found = passes.teacher_hidden(self.chunks, batches)
        if self.early:
            found = [None if rows_GH is None else host_copy(rows_GH) for rows_GH in found]
        return [replace(batch, teacher_hidden_GH=x) for batch, x in zip(batches, found, strict=True)]

    def with_logprobs(self, batches: Sequence[MicroBatch], head: Head) -> list[MicroBatch]:
        """Run the teacher's pass, and add its log-probs of the sampled tokens to the micro-batches."""
        with self.reading():
            found = passes.teacher_logprobs(self.chunks, batches, head)
        return [replace(batch, teacher_logprobs_T=x) for batch, x in zip(batches, found, strict=True)]


class RolloutTeacher(Teacher):
    """`rollout`: the student's weights before the rollout step's first update, for several mini-batches per step."""

    kind = "rollout"
    early = True

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        super().__init__(chunks)
        self._matrix: Tensor | None = None

    def begin(self, step: int) -> None:
        self._matrix = None if self.output is None else host_copy(self.output.detach())

    def matrix(self) -> Tensor | None:
        if self._matrix is None or self.output is None:
            return None
        return self._matrix.to(self.output.device, non_blocking=True)


class FrozenTeacher(Teacher):
    """`initial`: frozen weights in host memory. Base class of teachers with moving copies."""

    kind = "initial"

    def __init__(self, chunks: Sequence[nn.Module], weights: FrozenWeights) -> None:
        super().__init__(chunks)
        self.weights = weights

    def reading(self) -> AbstractContextManager[None]:
        return self.weights.swapped_in(self.chunks)

    def matrix(self) -> Tensor | None:
        return None if self.output is None else self.weights.of(self.output, self.chunks)


class PeriodicTeacher(FrozenTeacher):
    """`every`: a copy of the student's weights, renewed at every N-th rollout step."""

    kind = "every"

    def __init__(self, chunks: Sequence[nn.Module], every: int) -> None:
        super().__init__(chunks, FrozenWeights(chunks))
        self.every = every

    @property
    def kept(self) -> list[Tensor]:
        return self.weights.tensors

    def begin(self, step: int) -> None:
        if step % self.every == 0:
            self.restart()

    def restart(self) -> None:
        self.weights.follow(self.chunks)


class AverageTeacher(FrozenTeacher):
    """`ema`: exponential moving average of the student's weights over optimizer steps, in float32."""

    kind = "ema"
    follows_updates = True

    def __init__(self, chunks: Sequence[nn.Module], rate: float) -> None:
        super().__init__(chunks, FrozenWeights(chunks, torch.float32))
        self.rate = rate

    @property
    def kept(self) -> list[Tensor]:
        return self.weights.tensors

    def updated(self) -> None:
        self.weights.follow(self.chunks, self.rate)

    def restart(self) -> None:
        self.weights.follow(self.chunks)


def build_teacher(
    config: ObjectiveConfig, chunks: Sequence[nn.Module], initial: FrozenWeights | None, minibatches: int
) -> Teacher:
    """Build the teacher of `config.teacher`.

    Args:
        chunks: hold the initial weights of the run.
        initial: a copy of those weights, for "initial".
        minibatches: optimizer steps per rollout step; with 1, "rollout" equals "current".
    """
    match config.teacher:
        case "every":
            return PeriodicTeacher(chunks, config.teacher_every)
        case "ema":
            return AverageTeacher(chunks, config.teacher_ema)
        case "initial":
            assert initial is not None
            return FrozenTeacher(chunks, initial)
        case "rollout" if minibatches > 1:
            return RolloutTeacher(chunks)
        case "current" | "rollout":
            return Teacher(chunks)
