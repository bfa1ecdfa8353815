"""Records of a training step. Each stage takes records and returns new ones.

Shape suffixes: B sequences of a micro-batch, S their padded length (packed: B is 1 and S is the number of tokens),
T response tokens of a micro-batch (rows of the output head), G response tokens with an open gate, H hidden size, L
layers, K experts per token, Q packed sequences.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # verifier processes import this module; importing torch would take seconds
    import numpy as np
    import torch
    from torch import Tensor

    TokenIds = np.ndarray[tuple[int], np.dtype[np.int32]]
    LogProbs = np.ndarray[tuple[int], np.dtype[np.float32]]
    Routing = np.ndarray[tuple[int, int, int], np.dtype[np.integer[Any]]]
    """Selected experts of each token, [tokens, layers, experts per token]."""
    TensorFunction = Callable[[Tensor], Tensor]

FinishReason = Literal["stop", "length", "abort"]
Answer = str | Mapping[str, Any] | Sequence[Any]
"""Text (also for numbers), or a dict or list of the data."""


def answer_text(answer: Answer) -> str:
    """Answer as text; JSON for a dict or list."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, rendered for student and teacher with the model's chat template.

    The teacher's prompt has the privileged context in addition. The same response follows both prompts.
    """

    uid: str
    """Stable name, ``<file name>:<row>``."""
    student_tokens: tuple[int, ...]
    teacher_tokens: tuple[int, ...]
    answer: Answer
    """Reference answer, for verifiers."""
    question: str = ""
    history: tuple[Mapping[str, str], ...] = ()
    """Chat messages before the question."""
    metadata: Mapping[str, object] = field(default_factory=dict)

    @property
    def answer_text(self) -> str:
        return answer_text(self.answer)


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled response of N tokens."""

    tokens: TokenIds
    """Response tokens [N], including the stop token if `finish_reason` is "stop"."""
    logprobs: LogProbs
    """Log-probability (natural) of each token under the rollout weights, at the sampling temperature, before top-p."""
    finish_reason: FinishReason
    weight_version: int
    text: str
    """Decoded response without special tokens, for verifiers."""
    experts: Routing | None = field(default=None, repr=False)
    """Selected experts of all prompt and response tokens except the last; None if not recorded."""

    def __eq__(self, other: object) -> bool:
        """Compare all fields but `experts`; arrays are equal if their bytes are."""
        return isinstance(other, Completion) and self._content() == other._content()

    def _content(self) -> tuple[object, ...]:
        arrays = self.tokens.tobytes(), self.logprobs.tobytes()
        return *arrays, self.finish_reason, self.weight_version, self.text


@dataclass(frozen=True, slots=True)
class Group:
    """Responses to one prompt."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """Group with rewards and advantages, in completion order."""

    group: Group
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    """Empty until the step's groups are shaped."""
    failures: int = 0
    """Number of failed verifier calls; their completions have the failure reward."""
    answers: tuple[str | None, ...] | None = None
    """Extracted answer of each completion, None for none. None if answers were not extracted."""
    errors: tuple[str | None, ...] = ()
    """Error message of each failed verifier call, None for successful calls; empty if no call failed."""
    teacher_prompts: tuple[tuple[int, ...] | None, ...] | None = None
    """Teacher prompt of each completion, None for a completion without one. None: all use the group's."""

    def teacher_prompt(self, number: int) -> tuple[int, ...] | None:
        """Teacher prompt of a completion; None for none."""
        return self.group.prompt.teacher_tokens if self.teacher_prompts is None else self.teacher_prompts[number]


@dataclass(frozen=True, slots=True)
class Route:
    """All-to-all exchange of rows between context-parallel ranks."""

    sent: tuple[int, ...]
    """Number of this rank's rows sent to each rank, in row order."""
    received: tuple[int, ...]
    """Number of rows received from each rank."""
    order_G: Tensor
    """int64 [G]: index of each needed row among the received rows."""

    def mapped(self, function: TensorFunction) -> Route:
        return Route(self.sent, self.received, function(self.order_G))


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Token sequences, padded or packed, and the positions that predict response tokens.

    Under context parallelism (packed only), this rank's part of each sequence.
    """

    tokens_BS: Tensor
    """int64 [B, S], right-padded; packed: [1, S]."""
    rows_T: Tensor
    """int64 [T]: index b * S + s of the position that predicts each response token, sequence by sequence."""
    lengths: tuple[int, ...] | None = None
    """Lengths of the packed sequences with their padding, over all context-parallel ranks; None for padded batches."""
    multiple: int = 1
    """The number of packed tokens on a rank is padded to a multiple of this."""
    route: Route | None = None
    """Exchange of rows under context parallelism; None if rows stay on their rank."""
    sequence_BS: Tensor | None = None
    """int64 [B, S]: sequence index of each token, -1 for padding. Read by routers only."""
    sizes_Q: Tensor | None = None
    """int64 [Q]: number of tokens of each sequence without padding, over all context-parallel ranks. Read by
    routers only."""
    experts_BSLK: Tensor | None = None
    """int16 [B, S, L, K]: replayed experts of each token, -1 for the router's choice. None: no replay."""
    numbers_BS: Tensor | None = None
    """int64 [B, S]: index of each token in this rank's step, 0 for padding. Read by routers only."""

    def mapped(self, function: TensorFunction) -> SequenceBatch:
        return SequenceBatch(**_mapped_parts(self, function))

    @property
    def count(self) -> int:
        """Number of sequences, including padding sequences."""
        return self.tokens_BS.shape[0] if self.lengths is None else len(self.lengths)

    def emptied(self) -> SequenceBatch:
        """Short batch of padding without response tokens."""
        kept, lengths = self.tokens_BS.shape[1], None
        if self.lengths is not None:
            kept, lengths = self.multiple, (sum(self.lengths) // kept * self.multiple,)
        return replace(
            self,
            tokens_BS=self.tokens_BS[:1, :kept],
            rows_T=self.rows_T[:0],
            lengths=lengths,
            sequence_BS=None if self.sequence_BS is None else self.sequence_BS[:1, :kept] * 0 - 1,
            sizes_Q=None if self.sizes_Q is None else self.sizes_Q[:0],
            experts_BSLK=None if self.experts_BSLK is None else self.experts_BSLK[:1, :kept],
            numbers_BS=None if self.numbers_BS is None else self.numbers_BS[:1, :kept] * 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Input of one forward and backward pass. Per-token tensors are in the order of `student.rows_T`."""

    student: SequenceBatch
    teacher: SequenceBatch | None
    """Teacher sequences of the samples with an open gate; None if there are none."""
    gated_rows_G: Tensor
    """int64 [G]: index into T of each row of `teacher.rows_T`."""
    labels_T: Tensor
    """int64 [T] response tokens."""
    sequence_T: Tensor
    """int64 [T]: index of each response token's sequence in the micro-batch."""
    advantages_T: Tensor
    gates_T: Tensor
    """float32 [T]: 1 for distilled tokens, else 0."""
    weights_T: Tensor
    """float32 [T]: aggregation weights. Over all micro-batches and data-parallel ranks of an optimizer step they sum to
    the global number of response tokens, by which the sum of the losses is divided."""
    rollout_logprobs_T: Tensor
    old_logprobs_T: Tensor | None = None
    """Log-probs under the weights before the rollout's first optimizer step; None with one step per rollout."""
    corrections_T: Tensor | None = None
    """Factor of each token's loss that corrects the mismatch between rollout engine and trainer; None for 1."""
    reference_logprobs_T: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None
    """float32 [T]: log-probs under the teacher, computed before the rollout's first update; 0 at closed gates. None if
    the objective does not need them, or no gate is open."""
    teacher_hidden_GH: Tensor | None = None
    """[G, H]: last hidden states of the teacher at `teacher.rows_T`, before the output layer."""

    @property
    def num_tokens(self) -> int:
        return int(self.labels_T.numel())

    def emptied(self) -> MicroBatch:
        """Micro-batch that takes part in every collective without contributing to the loss."""
        student = self.student.emptied()
        return replace(self.mapped(lambda tensor: tensor[:0]), student=student, teacher=student)

    def mapped(self, function: TensorFunction) -> MicroBatch:
        """Apply `function` to every tensor, in a fixed order."""
        return MicroBatch(**_mapped_parts(self, function))

    def to(self, device: torch.device) -> MicroBatch:
        """Move every tensor to `device`. `mcore.transfer.to_device` copies several batches at once."""
        return self.mapped(lambda tensor: tensor.to(device))


def _mapped_parts(record: SequenceBatch | MicroBatch, function: TensorFunction) -> dict[str, Any]:
    import torch

    def mapped(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return function(part)
        return part.mapped(function) if isinstance(part, Route | SequenceBatch) else part

    return {part.name: mapped(getattr(record, part.name)) for part in dataclasses.fields(record)}
