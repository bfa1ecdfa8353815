"""What flows along one training step. Every stage takes some of these and returns new ones.

Shape suffixes: B sequences of a micro-batch, S their padded length (where they are packed, B is 1 and S all tokens),
T response tokens of a micro-batch (the rows that the head sees), G those of them whose gate is open, H hidden size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # processes that run verifiers read these records, too; to import torch takes them seconds
    import numpy as np
    import torch
    from torch import Tensor

    Routing = np.ndarray[tuple[int, int, int], np.dtype[np.integer[Any]]]
    """[tokens, layers, experts of a token]: which experts of a mixture each token was sent to."""
    TensorFunction = Callable[[Tensor], Tensor]

FinishReason = Literal["stop", "length", "abort"]
Answer = str | Mapping[str, Any] | Sequence[Any]
"""Text, or the dict or list that the data has; numbers are text."""


def answer_text(answer: Answer) -> str:
    """An answer as text: itself, or its JSON where it is a dict or list."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, rendered twice with the model's chat template.

    The teacher reads the same question together with the privileged context; both are followed by the same response.
    """

    uid: str
    """Stable name, ``<file name>:<row>``."""
    student_tokens: tuple[int, ...]
    teacher_tokens: tuple[int, ...]
    answer: Answer
    """The reference answer, which verifiers compare with."""
    question: str = ""
    history: tuple[Mapping[str, str], ...] = ()
    """Chat messages before the question."""
    metadata: Mapping[str, object] = field(default_factory=dict)

    @property
    def answer_text(self) -> str:
        """The answer as text; see `answer_text`."""
        return answer_text(self.answer)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response."""

    tokens: tuple[int, ...]
    """Response tokens; the stop token is the last of them where `finish_reason` is "stop"."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each token under the rollout weights, at the sampling temperature, before top-p."""
    finish_reason: FinishReason
    weight_version: int
    text: str
    """Decoded response without special tokens: what a verifier reads."""
    experts: Routing | None = field(default=None, compare=False, repr=False)
    """Of every token of prompt and response but the last, which is read by nobody; None where it is not recorded."""


@dataclass(frozen=True, slots=True)
class Group:
    """The responses to one prompt."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with its verifier's rewards and the advantages that follow from them, in completion order."""

    group: Group
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    """Empty until the step's groups are shaped."""
    failures: int = 0
    """Verifier calls that raised or ran out of time; each gave its sample the failure reward."""
    answers: tuple[str | None, ...] | None = None
    """The answer that each completion gives, as the verifier reads it; None where nobody asked, or it cannot say."""
    errors: tuple[str | None, ...] = ()
    """Why the verifier's call on each completion failed, None where it did not; empty where none did."""
    teacher_prompts: tuple[tuple[int, ...] | None, ...] | None = None
    """What the teacher reads before each completion, None where there is nothing for it to read; None for the group's
    own teacher prompt."""

    def teacher_prompt(self, number: int) -> tuple[int, ...] | None:
        """What the teacher reads before a completion."""
        return self.group.prompt.teacher_tokens if self.teacher_prompts is None else self.teacher_prompts[number]


@dataclass(frozen=True, slots=True)
class Route:
    """How the rows that a context-parallel rank has computed come to the ranks that want them, all to all."""

    sent: tuple[int, ...]
    """How many of this rank's rows, in their order, go to each rank."""
    received: tuple[int, ...]
    """How many come from each rank."""
    order_G: Tensor
    """int64: at which place each row that is wanted here arrives."""

    def mapped(self, function: TensorFunction) -> Route:
        return Route(self.sent, self.received, function(self.order_G))


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Token sequences and the positions whose next token is a response token: padded, or packed one after the other.

    Under context parallelism, which takes packed ones, this rank's share of each sequence alone.
    """

    tokens_BS: Tensor
    """int64 [B, S], right-padded; packed, [1, S]."""
    rows_T: Tensor
    """int64 [T]: index b * S + s of the position that predicts each response token, sequence by sequence."""
    lengths: tuple[int, ...] | None = None
    """Of the packed sequences, over all context-parallel ranks and with what pads them; None where they are padded."""
    multiple: int = 1
    """Of what the number of packed tokens on a rank has to be a multiple."""
    route: Route | None = None
    """Under context parallelism, for sequences whose rows are wanted elsewhere."""
    sequence_BS: Tensor | None = None
    """int64 [B, S]: which sequence each token is of, -1 in padding; None where nobody asks."""
    sizes_Q: Tensor | None = None
    """int64: tokens of each sequence without padding, over all context-parallel ranks; None likewise."""
    experts_BSLK: Tensor | None = None
    """int16 [B, S, layers, experts of a token] that each token is to be sent to, -1 for the router's own choice; None
    where all of it is."""
    numbers_BS: Tensor | None = None
    """int64 [B, S]: each token's number in this rank's step, 0 in padding; None where no router asks for it."""

    def mapped(self, function: TensorFunction) -> SequenceBatch:
        return SequenceBatch(**_mapped_parts(self, function))

    @property
    def count(self) -> int:
        """Sequences, those included that only fill up."""
        return self.tokens_BS.shape[0] if self.lengths is None else len(self.lengths)

    def emptied(self) -> SequenceBatch:
        """A short one of mere padding, with no response token marked."""
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
    """What one forward and backward pass reads. Per-token tensors follow the order of `student.rows_T`."""

    student: SequenceBatch
    teacher: SequenceBatch | None
    """Teacher sequences of the samples with an open gate; None where there is none."""
    gated_rows_G: Tensor
    """int64 [G]: position in 0..T-1 of each row of `teacher.rows_T`."""
    labels_T: Tensor
    """int64 [T] response tokens."""
    sequence_T: Tensor
    """int64 [T]: which sequence of the micro-batch each response token is of."""
    advantages_T: Tensor
    gates_T: Tensor
    """float32 [T], 1 where the distillation term counts."""
    weights_T: Tensor
    """float32 [T] aggregation weights; they sum to the global number of response tokens over all micro-batches and
    data-parallel ranks of one optimiser step, so that dividing by that number gives the loss."""
    rollout_logprobs_T: Tensor
    old_logprobs_T: Tensor | None = None
    """Log-probs under the weights before the first optimiser step on this batch; None where there is but one step."""
    corrections_T: Tensor | None = None
    """What each token's loss is multiplied by, because the rollout engine is not the trainer; None for 1."""
    reference_logprobs_T: Tensor | None = None
    teacher_logprobs_T: Tensor | None = None
    """float32 [T], 0 at closed gates: log-probs under the teacher, computed before the rollout's first update. None
    where the objective does not ask for them, or no gate is open."""
    teacher_hidden_GH: Tensor | None = None
    """Last hidden states of the teacher at `teacher.rows_T`, before the output layer."""

    @property
    def num_tokens(self) -> int:
        return int(self.labels_T.numel())

    def emptied(self) -> MicroBatch:
        """A micro-batch that takes part in every collective and contributes nothing."""
        student = self.student.emptied()
        return MicroBatch(
            student=student,
            teacher=student,
            gated_rows_G=self.gated_rows_G[:0],
            labels_T=self.labels_T[:0],
            sequence_T=self.sequence_T[:0],
            advantages_T=self.advantages_T[:0],
            gates_T=self.gates_T[:0],
            weights_T=self.weights_T[:0],
            rollout_logprobs_T=self.rollout_logprobs_T[:0],
            old_logprobs_T=None if self.old_logprobs_T is None else self.old_logprobs_T[:0],
            corrections_T=None if self.corrections_T is None else self.corrections_T[:0],
            reference_logprobs_T=None if self.reference_logprobs_T is None else self.reference_logprobs_T[:0],
            teacher_logprobs_T=None if self.teacher_logprobs_T is None else self.teacher_logprobs_T[:0],
            teacher_hidden_GH=None if self.teacher_hidden_GH is None else self.teacher_hidden_GH[:0],
        )

    def mapped(self, function: TensorFunction) -> MicroBatch:
        """The same micro-batch with `function` of every tensor, in an order that does not change."""
        return MicroBatch(**_mapped_parts(self, function))

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with every tensor on `device`. `mcore.transfer.to_device` copies all at once."""
        return self.mapped(lambda tensor: tensor.to(device))


def _mapped_parts(record: SequenceBatch | MicroBatch, function: TensorFunction) -> dict[str, Any]:
    import torch

    def mapped(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return function(part)
        return part.mapped(function) if isinstance(part, Route | SequenceBatch) else part

    return {part.name: mapped(getattr(record, part.name)) for part in dataclasses.fields(record)}
