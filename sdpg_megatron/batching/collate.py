"""From samples to the tensors of a micro-batch: packed one after the other, or padded to the longest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore.context_parallel import route, shards
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.records import MicroBatch, SequenceBatch

if TYPE_CHECKING:
    from sdpg_megatron.records import Routing


@dataclass(frozen=True, slots=True)
class PackingLayout:
    """How a step's sequences lie in tensors, and which of them, and of their tokens, are this rank's."""

    packed: bool = True
    multiple: int = 1
    """Of what a micro-batch's tokens on a rank, or padded lengths, are multiples: the tensor-parallel size under
    sequence parallelism."""
    context: int = 0
    context_size: int = 1
    """This rank among the context-parallel ones."""
    data: int = 0
    data_size: int = 1
    """And among the data-parallel ones."""

    @classmethod
    def of(cls, config: RunConfig, ranks: ParallelState) -> PackingLayout:
        """A run's, on this rank."""
        multiple = ranks.tensor_size if config.parallel.sequence else 1
        return cls(config.model.packed, multiple, ranks.context, ranks.context_size, ranks.data, ranks.data_size)

    @property
    def unit(self) -> int:
        """Of what a packed sequence's length is a multiple: context-parallel ranks share it in so many chunks."""
        return 2 * self.context_size if self.context_size > 1 else 1


@dataclass(frozen=True, slots=True)
class _Text:
    """What a model reads, and at which response tokens it is asked for its prediction."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    asked: tuple[bool, ...]
    experts: Routing | None = None
    """That its tokens, but for the last, are sent to."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def collate(samples: Sequence[Sample], layout: PackingLayout) -> MicroBatch:
    """Build a micro-batch; no samples make one that contributes nothing."""
    gated = [sample for sample in samples if sample.gate]
    read = [_Text(s.student_prompt, s.response, (True,) * len(s.response), s.experts) for s in samples]
    student, rank_T = _lay(read, layout)
    gates_T = torch.tensor([float(gate) for s in samples for gate in s.gates])
    sequence_T = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s.response) for s in samples]).long())
    logprobs_T = torch.tensor([x for s in samples for x in s.logprobs], dtype=torch.float32)
    assert logprobs_T.shape == gates_T.shape, "a log-prob for each response token"

    def hinted(texts: list[_Text]) -> SequenceBatch | None:
        """What a teacher reads. Its rows are wanted where the student's are."""
        if not texts:
            return None
        read, from_G = _lay(texts, layout)
        if layout.context_size == 1:
            return read
        mine, along = route(from_G, rank_T[gates_T.bool()], layout.context, layout.context_size)
        return replace(read, rows_T=read.rows_T[mine], route=along)

    here = rank_T == layout.context
    return MicroBatch(
        student=replace(student, rows_T=student.rows_T[here]),
        teacher=hinted([_Text(s.teacher_prompt, s.response, s.gates) for s in gated]),
        gated_rows_G=gates_T[here].nonzero().squeeze(1),
        labels_T=torch.tensor([t for s in samples for t in s.response], dtype=torch.int64)[here],
        sequence_T=sequence_T[here],
        advantages_T=torch.tensor([s.advantage for s in samples])[sequence_T][here],
        gates_T=gates_T[here],
        weights_T=torch.tensor([s.weight for s in samples])[sequence_T][here],
        rollout_logprobs_T=logprobs_T[here],
    )


def _lay(texts: Sequence[_Text], layout: PackingLayout) -> tuple[SequenceBatch, Tensor]:
    """This rank's tokens, and for every response token that is asked for, on any rank: its row there, and that rank."""
    spans, multiple = _pack(texts, layout) if layout.packed else _pad(texts, layout.multiple)
    firsts = [0, *itertools.accumulate(spans)]
    tokens_P = torch.zeros(firsts[-1], dtype=torch.int64)
    sequence_P = torch.full((firsts[-1],), -1)
    for number, text in enumerate(texts):
        own = slice(firsts[number], firsts[number] + len(text))
        tokens_P[own] = torch.tensor(text.prompt + text.response)
        sequence_P[own] = number
    rank_P, place_P = shards(spans, layout.context_size)
    shape = (1 if layout.packed else len(spans), -1)
    here = rank_P == layout.context
    at_T = _rows(texts, firsts)
    experts_PLK = _experts(texts, firsts)
    batch = SequenceBatch(
        tokens_BS=tokens_P[here].view(shape),
        rows_T=place_P[at_T],
        lengths=tuple(spans) if layout.packed else None,
        multiple=multiple,
        sequence_BS=sequence_P[here].view(shape),
        sizes_Q=torch.tensor([len(text) for text in texts], dtype=torch.int64),
        experts_BSLK=None if experts_PLK is None else experts_PLK[here].view(*shape, *experts_PLK.shape[1:]),
    )
    return batch, rank_P[at_T]


def _experts(texts: Sequence[_Text], firsts: Sequence[int]) -> Tensor | None:
    """int16 [P, layers, experts of a token], see `SequenceBatch.experts_BSLK`; None where none are given."""
    given = [text.experts for text in texts if text.experts is not None]
    if not given:
        return None
    experts_PLK = torch.full((firsts[-1], *given[0].shape[1:]), -1, dtype=torch.int16)
    for first, text in zip(firsts, texts, strict=False):
        if text.experts is not None:
            experts_PLK[first : first + len(text.experts)] = torch.from_numpy(text.experts.astype("int16"))
    return experts_PLK


def _pad(texts: Sequence[_Text], multiple: int) -> tuple[list[int], int]:
    """How many positions each text gets, as many as the longest; and of what a number of tokens is a multiple."""
    longest = max(map(len, texts), default=1)
    return [-(-longest // multiple) * multiple] * max(len(texts), 1), multiple


def _pack(texts: Sequence[_Text], layout: PackingLayout) -> tuple[list[int], int]:
    """The same, where a sequence of its own fills up what is missing for a multiple of tokens on each rank."""
    size, unit = layout.context_size, layout.unit
    multiple = math.lcm(layout.multiple, unit // size)
    spans = [-(-len(text) // unit) * unit for text in texts]
    filling = -sum(spans) % (multiple * size) or (0 if texts else multiple * size)
    return [*spans, filling] if filling else spans, multiple


def _rows(texts: Sequence[_Text], firsts: Sequence[int]) -> Tensor:
    """The positions that predict the response tokens which are asked for, with each text's first position given."""
    rows: list[int] = []
    for first, text in zip(firsts, texts, strict=False):
        before = first + len(text.prompt) - 1
        rows.extend(before + i for i, wanted in enumerate(text.asked) if wanted)
    return torch.tensor(rows, dtype=torch.int64)
