"""Build the tensors of a micro-batch from samples: packed, or padded to the longest sequence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.config import RunConfig
from sdpg_megatron.mcore.context_parallel import route, shards
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.records import MicroBatch, SequenceBatch

if TYPE_CHECKING:
    from sdpg_megatron.batching.samples import Gates
    from sdpg_megatron.records import Routing, TokenIds


@dataclass(frozen=True, slots=True)
class PackingLayout:
    """Tensor layout of a step's sequences, and this rank's position among the data- and context-parallel ranks."""

    packed: bool = True
    multiple: int = 1
    """A micro-batch's packed tokens on a rank, or its padded lengths, are a multiple of this: the tensor-parallel size
    under sequence parallelism."""
    context: int = 0
    context_size: int = 1
    data: int = 0
    data_size: int = 1

    @classmethod
    def of(cls, config: RunConfig, ranks: ParallelState) -> PackingLayout:
        """Layout of a run on this rank."""
        multiple = ranks.tensor_size if config.parallel.sequence else 1
        return cls(config.model.packed, multiple, ranks.context, ranks.context_size, ranks.data, ranks.data_size)

    @property
    def unit(self) -> int:
        """A packed sequence's length is a multiple of this: the number of its context-parallel chunks."""
        return 2 * self.context_size if self.context_size > 1 else 1


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    """A prompt with a response, and a mask of the response tokens to predict."""

    prompt: TokenIds
    response: TokenIds
    predicted: Gates
    """[N]: True at the N response tokens that are predicted."""
    experts: Routing | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def collate(samples: Sequence[Sample], layout: PackingLayout) -> MicroBatch:
    """Build a micro-batch. Without samples it contributes nothing."""
    students = [_student(sample) for sample in samples]
    student, rank_T = _arrange(students, layout)
    rows = [sequence.predicted for sequence in students]
    assert not any((s.gates & ~row).any() for s, row in zip(samples, rows, strict=True)), "gates of predicted tokens"
    gates_T = _concatenate((s.gates[row] for s, row in zip(samples, rows, strict=True)), np.float32)
    logprobs_T = _concatenate((s.logprobs[row] for s, row in zip(samples, rows, strict=True)), np.float32)
    sequence_T = torch.arange(len(samples)).repeat_interleave(torch.tensor([row.sum() for row in rows]).long())

    teacher = None
    if gated := [_Sequence(s.teacher_prompt, s.response, s.gates) for s in samples if s.gate]:
        teacher, from_G = _arrange(gated, layout)
        if rank_T is not None and from_G is not None:  # the teacher's rows are used on the ranks of the student's
            mine, along = route(from_G, rank_T[gates_T.bool()], layout.context, layout.context_size)
            teacher = replace(teacher, rows_T=teacher.rows_T[mine], route=along)

    here = slice(None) if rank_T is None else rank_T == layout.context
    return MicroBatch(
        student=replace(student, rows_T=student.rows_T[here]),
        teacher=teacher,
        gated_rows_G=gates_T[here].nonzero().squeeze(1),
        labels_T=_concatenate((s.response[row] for s, row in zip(samples, rows, strict=True)), np.int64)[here],
        sequence_T=sequence_T[here],
        advantages_T=torch.tensor([s.advantage for s in samples])[sequence_T][here],
        gates_T=gates_T[here],
        weights_T=torch.tensor([s.weight for s in samples])[sequence_T][here],
        rollout_logprobs_T=logprobs_T[here],
    )


def _student(sample: Sample) -> _Sequence:
    predicted = np.ones(len(sample.response), bool) if sample.predicted is None else sample.predicted
    return _Sequence(sample.student_prompt, sample.response, predicted, sample.experts)


def _arrange(sequences: Sequence[_Sequence], layout: PackingLayout) -> tuple[SequenceBatch, Tensor | None]:
    """This rank's tokens, with the rows of all ranks' predicted response tokens, and the rank that has each row.

    The ranks are None if there is one context-parallel rank.
    """
    spans, multiple = _pack(sequences, layout) if layout.packed else _pad(sequences, layout.multiple)
    firsts = [0, *itertools.accumulate(spans)]
    tokens_P, sequence_P = np.zeros(firsts[-1], np.int64), np.full(firsts[-1], -1, np.int64)
    positions = []
    for number, (first, sequence) in enumerate(zip(firsts, sequences, strict=False)):
        start, end = first + len(sequence.prompt), first + len(sequence)
        tokens_P[first:start] = sequence.prompt
        tokens_P[start:end] = sequence.response
        sequence_P[first:end] = number
        positions.append(start - 1 + np.flatnonzero(sequence.predicted))
    row_T, rank_T = _concatenate(positions, np.int64), None
    here: Tensor | slice = slice(None)
    if layout.context_size > 1:
        rank_P, place_P = shards(spans, layout.context_size)
        row_T, rank_T, here = place_P[row_T], rank_P[row_T], rank_P == layout.context
    shape = (1 if layout.packed else len(spans), -1)
    experts_PLK = _experts(sequences, firsts)
    batch = SequenceBatch(
        tokens_BS=torch.from_numpy(tokens_P)[here].view(shape),
        rows_T=row_T,
        lengths=tuple(spans) if layout.packed else None,
        multiple=multiple,
        sequence_BS=torch.from_numpy(sequence_P)[here].view(shape),
        sizes_Q=torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64),
        experts_BSLK=None if experts_PLK is None else experts_PLK[here].view(*shape, *experts_PLK.shape[1:]),
    )
    return batch, rank_T


def _concatenate(arrays: Iterable[np.ndarray[Any, Any]], dtype: type[np.generic]) -> Tensor:
    """One tensor of all arrays; empty if there are none."""
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype))


def _experts(sequences: Sequence[_Sequence], firsts: Sequence[int]) -> Tensor | None:
    """int16 [P, layers, experts of a token], see `SequenceBatch.experts_BSLK`; None if no sequence has experts."""
    given = [sequence.experts for sequence in sequences if sequence.experts is not None]
    if not given:
        return None
    experts_PLK = torch.full((firsts[-1], *given[0].shape[1:]), -1, dtype=torch.int16)
    for first, sequence in zip(firsts, sequences, strict=False):
        if sequence.experts is not None:
            experts_PLK[first : first + len(sequence.experts)] = torch.from_numpy(sequence.experts.astype("int16"))
    return experts_PLK


def _pad(sequences: Sequence[_Sequence], multiple: int) -> tuple[list[int], int]:
    """Padded length of each sequence, and the divisor of a rank's tokens."""
    longest = max(map(len, sequences), default=1)
    return [-(-longest // multiple) * multiple] * max(len(sequences), 1), multiple


def _pack(sequences: Sequence[_Sequence], layout: PackingLayout) -> tuple[list[int], int]:
    """Packed length of each sequence, and the divisor of a rank's tokens; a padding sequence fills up to it."""
    size, unit = layout.context_size, layout.unit
    multiple = math.lcm(layout.multiple, unit // size)
    spans = [-(-len(sequence) // unit) * unit for sequence in sequences]
    filling = -sum(spans) % (multiple * size) or (0 if sequences else multiple * size)
    return [*spans, filling] if filling else spans, multiple
