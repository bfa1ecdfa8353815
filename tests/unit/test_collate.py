"""Packed micro-batches, and the shares of context-parallel ranks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.mcore.context_parallel import shards
from sdpg_megatron.records import MicroBatch, SequenceBatch


def some_samples(count: int = 9) -> list[Sample]:
    """Every token of a step is another one, but that student and teacher read the same response."""
    draw = random.Random(1)
    fresh = iter(range(1, 10_000))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(next(fresh) for _ in range(count))

    samples = []
    for number in range(count):
        response = tokens(draw.randint(1, 11))
        samples.append(
            Sample(
                student_prompt=tokens(draw.randint(1, 9)),
                teacher_prompt=tokens(draw.randint(4, 19)),
                response=response,
                logprobs=tuple(-0.01 * token for token in response),
                advantage=1.0 + number,
                gates=tuple(number % 2 == 0 and draw.random() < 0.7 for _ in response),
                weight=0.5 + number,
            )
        )
    return samples


def test_packed_sequences_lie_one_after_the_other() -> None:
    samples = some_samples(3)
    batch = collate(samples, PackingLayout())
    whole = [list(s.student_prompt + s.response) for s in samples]
    assert batch.student.tokens_BS.tolist() == [[token for text in whole for token in text]]
    assert batch.student.lengths == tuple(map(len, whole))
    assert following(batch.student) == batch.labels_T.tolist() == [t for s in samples for t in s.response]
    assert batch.teacher is not None
    asked = [t for s in samples for t, gate in zip(s.response, s.gates, strict=True) if gate]
    assert asked and following(batch.teacher) == asked
    assert batch.labels_T[batch.gated_rows_G].tolist() == asked


def test_a_sequence_of_its_own_fills_up_to_a_multiple() -> None:
    samples = some_samples(3)
    total = sum(len(s.student_prompt) + len(s.response) for s in samples)
    for multiple in (4, total):
        student = collate(samples, PackingLayout(multiple=multiple)).student
        assert student.lengths is not None
        assert student.tokens_BS.shape[1] == sum(student.lengths) == -(-total // multiple) * multiple
        assert len(student.lengths) == 3 + (total % multiple > 0)


def following(batch: SequenceBatch) -> list[int]:
    return batch.tokens_BS.flatten()[batch.rows_T + 1].tolist()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("multiple", [1, 3])
def test_context_parallel_ranks_share_what_one_would_have(size: int, multiple: int) -> None:
    samples = some_samples()
    parts = [
        collate(samples, PackingLayout(multiple=multiple, context=rank, context_size=size)) for rank in range(size)
    ]
    whole = collate(samples, PackingLayout())
    lengths = parts[0].student.lengths
    assert lengths is not None and all(length % (2 * size) == 0 for length in lengths)
    for part in parts:
        assert part.student.lengths == lengths
        assert part.student.tokens_BS.shape[1] * size == sum(lengths)
        assert part.student.tokens_BS.shape[1] % multiple == 0
    # The tokens, put together again, are the sequences with their padding.
    ranks_P, places_P = shards(lengths, size)
    stacked = torch.stack([part.student.tokens_BS[0] for part in parts])
    pieces = torch.split(stacked[ranks_P, places_P], list(lengths))
    for sample, piece in zip(samples, pieces, strict=False):
        text = sample.student_prompt + sample.response
        assert piece.tolist() == [*text, *[0] * (len(piece) - len(text))]
    # Each response token is on one rank, with all that belongs to it.
    by_label = sorted(row for part in parts for row in _table(part))
    assert by_label == sorted(_table(whole))
    assert sum(len(part.labels_T) > 0 for part in parts) > 1


def _table(batch: MicroBatch) -> list[tuple[float, ...]]:
    columns = (
        batch.labels_T,
        batch.sequence_T,
        batch.advantages_T,
        batch.gates_T,
        batch.weights_T,
        batch.rollout_logprobs_T,
    )
    return [tuple(row) for row in torch.stack([column.double() for column in columns], dim=1).tolist()]


@pytest.mark.parametrize("size", [2, 4])
def test_routes_bring_the_teachers_rows_to_the_students(size: int) -> None:
    """A row's stand-in is the label of its student's sequence; they are handed over as the collective does it."""
    samples = some_samples()
    parts = [collate(samples, PackingLayout(context=rank, context_size=size)) for rank in range(size)]
    read = [part.teacher for part in parts]
    computed = [_next_tokens(read, rank) for rank in range(size)]
    sent = [torch.split(rows, list(one.route.sent)) for rows, one in zip(computed, read, strict=True)]
    crossing = 0
    for rank, (part, one) in enumerate(zip(parts, read, strict=True)):
        arrived = torch.cat([sent[source][rank] for source in range(size)])
        assert [len(sent[source][rank]) for source in range(size)] == list(one.route.received)
        assert arrived[one.route.order_G].tolist() == part.labels_T[part.gated_rows_G].tolist()
        crossing += len(arrived) - one.route.received[rank]
    assert crossing > 0


def _next_tokens(read: list[SequenceBatch], rank: int) -> torch.Tensor:
    """The token after each of a rank's rows, which may be another rank's first."""
    lengths = read[rank].lengths
    assert lengths is not None
    ranks_P, places_P = shards(lengths, len(read))
    natural = torch.stack([one.tokens_BS[0] for one in read])[ranks_P, places_P]
    positions = torch.zeros(read[rank].tokens_BS.shape[1], dtype=torch.int64)
    here = ranks_P == rank
    positions[places_P[here]] = here.nonzero().squeeze(1)
    return natural[positions[read[rank].rows_T] + 1]


def test_a_whole_batch_moves_with_its_routes() -> None:
    batch = collate(some_samples(), PackingLayout(context=1, context_size=2)).to(torch.device("meta"))
    assert batch.teacher is not None and batch.teacher.route is not None
    assert batch.teacher.route.order_G.is_meta and batch.teacher.tokens_BS.is_meta and batch.sequence_T.is_meta


def test_without_an_open_gate_nothing_is_read_on_any_rank() -> None:
    closed = [replace(sample, gates=(False,) * len(sample.gates)) for sample in some_samples()]
    batch = collate(closed, PackingLayout(context=1, context_size=2))
    assert batch.teacher is None and not len(batch.gated_rows_G)
