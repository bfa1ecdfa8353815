"""Packed micro-batches, and the shares of context-parallel ranks."""

from __future__ import annotations

import math
import random
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.mcore.context_parallel import route, shards
from sdpg_megatron.records import MicroBatch, SequenceBatch


def some_samples(count: int = 9) -> list[Sample]:
    """Every token of a step is another one, but that student and teacher read the same response."""
    draw = random.Random(1)
    fresh = iter(range(1, 10_000))

    def tokens(count: int) -> Any:
        return np.array([next(fresh) for _ in range(count)], np.int32)

    samples = []
    for number in range(count):
        response = tokens(draw.randint(1, 11))
        samples.append(
            Sample(
                student_prompt=tokens(draw.randint(1, 9)),
                teacher_prompt=tokens(draw.randint(4, 19)),
                response=response,
                logprobs=np.array([-0.01 * token for token in response], np.float32),
                advantage=1.0 + number,
                gates=np.array([number % 2 == 0 and draw.random() < 0.7 for _ in response]),
                weight=0.5 + number,
            )
        )
    return samples


def test_packed_sequences_lie_one_after_the_other() -> None:
    samples = some_samples(3)
    batch = collate(samples, PackingLayout())
    whole = [[*s.student_prompt, *s.response] for s in samples]
    assert batch.student.tokens_BS.tolist() == [[token for text in whole for token in text]]
    assert batch.student.lengths == tuple(map(len, whole))
    assert following(batch.student) == batch.labels_T.tolist() == [t for s in samples for t in s.response]
    assert batch.teacher is not None
    asked = [t for s in samples for t, gate in zip(s.response, s.gates, strict=True) if gate]
    assert asked and following(batch.teacher) == asked
    assert batch.labels_T[batch.gated_rows_G].tolist() == asked


@pytest.mark.parametrize("packed", [True, False])
def test_tokens_that_the_policy_did_not_sample_are_read_only(packed: bool) -> None:
    """They stay in the sequences of student and teacher, and have no row."""
    samples = [replace(s, predicted=np.arange(len(s.response)) % 3 != 1) for s in some_samples()]
    samples = [replace(s, gates=s.gates & s.predicted) for s in samples]
    layout = PackingLayout(packed=packed)
    whole, batch = collate(some_samples(), layout), collate(samples, layout)
    counted = torch.from_numpy(np.concatenate([s.predicted for s in samples]))
    assert torch.equal(batch.student.tokens_BS, whole.student.tokens_BS)
    for name in ("labels_T", "sequence_T", "advantages_T", "weights_T", "rollout_logprobs_T"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)[counted]), name
    assert torch.equal(batch.student.rows_T, whole.student.rows_T[counted])
    asked = [t for s in samples for t, gate in zip(s.response, s.gates, strict=True) if gate]
    assert asked and batch.labels_T[batch.gated_rows_G].tolist() == asked


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
        text = [*sample.student_prompt, *sample.response]
        assert piece.tolist() == text + [0] * (len(piece) - len(text))
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
    closed = [replace(sample, gates=np.zeros_like(sample.gates)) for sample in some_samples()]
    batch = collate(closed, PackingLayout(context=1, context_size=2))
    assert batch.teacher is None and not len(batch.gated_rows_G)


# --- against a reference that goes token by token

LAYOUTS = {
    "packed": PackingLayout(),
    "packed_multiple": PackingLayout(multiple=4),
    "padded": PackingLayout(packed=False, multiple=4),
    "context_parallel": PackingLayout(multiple=3, context=1, context_size=2),
    "context_parallel_4": PackingLayout(context=2, context_size=4),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("gated", [True, False])
def test_a_micro_batch_is_bit_equal_to_one_built_token_by_token(layout: PackingLayout, count: int, gated: bool) -> None:
    samples = some_samples(count)
    if not gated:
        samples = [replace(sample, gates=np.zeros_like(sample.gates)) for sample in samples]
    assert_equal(collate(samples, layout), naive(samples, layout))


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif is_dataclass(expected):
        for part in fields(expected):
            assert_equal(getattr(found, part.name), getattr(expected, part.name))
    else:
        assert found == expected


Text = tuple[list[int], list[int], list[bool]]
"""Prompt, response, and the response tokens that are predicted."""


def naive(samples: list[Sample], layout: PackingLayout) -> MicroBatch:
    whole = [(s.student_prompt.tolist(), s.response.tolist(), [True] * len(s.response)) for s in samples]
    read = [(s.teacher_prompt.tolist(), s.response.tolist(), s.gates.tolist()) for s in samples if any(s.gates)]
    student, to = naive_sequences(whole, layout)
    here = [row for row, rank in enumerate(to) if rank == layout.context]
    owner = [number for number, sample in enumerate(samples) for _ in sample.response]
    gates = [float(gate) for sample in samples for gate in sample.gates]
    labels = [token for sample in samples for token in sample.response.tolist()]
    logprobs = [value for sample in samples for value in sample.logprobs.tolist()]
    teacher = None
    if read:
        teacher, of = naive_sequences(read, layout)
        if layout.context_size > 1:
            wanted = torch.tensor([rank for rank, gate in zip(to, gates, strict=True) if gate])
            mine, along = route(torch.tensor(of), wanted, layout.context, layout.context_size)
            teacher = replace(teacher, rows_T=teacher.rows_T[mine], route=along)

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor([values[row] for row in here], dtype=torch.float32)

    return MicroBatch(
        student=replace(student, rows_T=student.rows_T[torch.tensor(here, dtype=torch.int64)]),
        teacher=teacher,
        gated_rows_G=torch.tensor([place for place, row in enumerate(here) if gates[row]], dtype=torch.int64),
        labels_T=torch.tensor([labels[row] for row in here], dtype=torch.int64),
        sequence_T=torch.tensor([owner[row] for row in here], dtype=torch.int64),
        advantages_T=floats([samples[number].advantage for number in owner]),
        gates_T=floats(gates),
        weights_T=floats([samples[number].weight for number in owner]),
        rollout_logprobs_T=floats(logprobs),
    )


def naive_sequences(texts: list[Text], layout: PackingLayout) -> tuple[SequenceBatch, list[int]]:
    """A rank's sequences with the rows of all ranks, and each row's rank."""
    sizes, ranks = [len(prompt) + len(response) for prompt, response, _ in texts], layout.context_size
    multiple = math.lcm(layout.multiple, 2) if ranks > 1 else layout.multiple
    if layout.packed:
        unit = 2 * ranks if ranks > 1 else 1
        spans = [-(-size // unit) * unit for size in sizes]
        while not spans or sum(spans) % (multiple * ranks):
            spans = [*spans, unit] if len(spans) == len(texts) else [*spans[:-1], spans[-1] + unit]
    else:
        spans = [-(-max(sizes, default=1) // multiple) * multiple] * max(1, len(texts))
    tokens, owners, rows, row_ranks = [], [], [], []
    places = dict.fromkeys(range(ranks), 0)
    for number, span in enumerate(spans):
        prompt, response, asked = texts[number] if number < len(texts) else ([], [], [])
        text = prompt + response
        chunk = span // (2 * ranks) if ranks > 1 else span
        place_of = []
        for position in range(span):
            rank = min(position // chunk, 2 * ranks - 1 - position // chunk) if ranks > 1 else 0
            place_of.append((rank, places[rank]))
            places[rank] += 1
            if rank == layout.context:
                tokens.append(text[position] if position < len(text) else 0)
                owners.append(number if position < len(text) else -1)
        for place, wanted in enumerate(asked):
            if wanted:
                row_rank, row = place_of[len(prompt) + place - 1]
                rows.append(row)
                row_ranks.append(row_rank)
    shape = (1, -1) if layout.packed else (len(spans), -1)
    batch = SequenceBatch(
        tokens_BS=torch.tensor(tokens).view(shape),
        rows_T=torch.tensor(rows, dtype=torch.int64),
        lengths=tuple(spans) if layout.packed else None,
        multiple=multiple,
        sequence_BS=torch.tensor(owners).view(shape),
        sizes_Q=torch.tensor(sizes, dtype=torch.int64),
    )
    return batch, row_ranks
