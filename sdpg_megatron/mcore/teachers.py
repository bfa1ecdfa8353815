"""Which weights read the privileged context: the student's, at one time or another, or a copy that moves otherwise.

A teacher that is not the student of the moment has an output matrix of its own, too: its rows are turned into
distributions by the matrix that they were made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.mcore.frozen_weights import FrozenWeights
from sdpg_megatron.mcore.model import output_weight
from sdpg_megatron.mcore.transfer import host_copy


class Teacher:
    """`current`: the student's weights at each mini-batch. Base of the others."""

    kind = "current"
    """Value of `ObjectiveConfig.teacher`."""
    early = False
    """Its rows are made before a rollout step's first update, those of all mini-batches."""
    follows_updates = False
    """`updated` reads the weights."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self.chunks = chunks
        (last,) = unwrap_model([chunks[-1]])
        self.output: nn.Parameter | None = output_weight(chunks[-1]) if last.post_process else None
        """The model's output matrix, on the stage that has it."""

    @property
    def kept(self) -> list[Tensor]:
        """What a checkpoint has to hold, in host memory and in the order of the parameters; empty for nothing."""
        return []

    def begin(self, step: int) -> None:
        """Rollout step `step` begins; its responses are there, its updates are not."""

    def updated(self) -> None:
        """The student took an optimizer step."""

    def restart(self) -> None:
        """Copy the student's present weights; a no-op for teachers that keep no moving weights."""

    def reading(self) -> AbstractContextManager[None]:
        """While this is open, the model computes with the teacher's weights."""
        return nullcontext()

    def matrix(self) -> Tensor | None:
        """The output matrix, this rank's shard, that belongs to its rows; None for the student's present one."""
        return None


class RolloutTeacher(Teacher):
    """`rollout`: the student's weights before the step's first update, for several mini-batches."""

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
    """`initial`: weights in host memory that do not move. Base of those that do."""

    kind = "initial"

    def __init__(self, chunks: Sequence[nn.Module], weights: FrozenWeights) -> None:
        super().__init__(chunks)
        self.weights = weights

    def reading(self) -> AbstractContextManager[None]:
        return self.weights.swapped_in(self.chunks)

    def matrix(self) -> Tensor | None:
        return None if self.output is None else self.weights.of(self.output, self.chunks)


class PeriodicTeacher(FrozenTeacher):
    """`every`: the student's weights as they were at the last of every N rollout steps."""

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
    """`ema`: an exponential moving average of the student's weights over optimizer steps, kept in float32."""

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
    """The teacher that `config.teacher` names.

    Args:
        chunks: with the weights that the run starts from.
        initial: those weights, for "initial".
        minibatches: optimizer steps per rollout; with one, "rollout" is "current".
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
