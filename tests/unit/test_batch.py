"""From scored groups to micro-batches."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sdpg_megatron.batching.collate import PackingLayout, collate
from sdpg_megatron.batching.micro_batches import Limit, balance, plan
from sdpg_megatron.batching.samples import Sample, distill_nothing
from sdpg_megatron.batching.samples import make_samples as samples_of
from sdpg_megatron.batching.step_batch import StepBatch, build_step, with_corrections
from sdpg_megatron.config import ObjectiveConfig
from sdpg_megatron.objectives import build_objective
from sdpg_megatron.records import Group, MicroBatch, Prompt, ScoredGroup
from tests.completions import make_completion

CPU = torch.device("cpu")
PADDED = PackingLayout(packed=False)
FOUR = Limit(4)


def make_samples(
    groups: list[ScoredGroup], config: ObjectiveConfig, *, distill: bool, stop_ids: Sequence[int] = ()
) -> list[Sample]:
    """Of a step with a teacher or without."""
    return samples_of(
        groups,
        config,
        distill_enabled=build_objective(config, 1).distill_enabled if distill else distill_nothing,
        stop_ids=stop_ids,
    )


def sample(prompt: int, response: int, *, teacher: int = 9, gate: bool = False, weight: float = 1.0) -> Sample:
    """Tokens count up from 100 (student), 200 (teacher) and 300 (response)."""
    return Sample(
        student_prompt=np.arange(100, 100 + prompt, dtype=np.int32),
        teacher_prompt=np.arange(200, 200 + teacher, dtype=np.int32),
        response=np.arange(300, 300 + response, dtype=np.int32),
        logprobs=np.full(response, -0.5, np.float32),
        advantage=1.0 if gate else -1.0,
        gates=np.full(response, gate),
        weight=weight,
    )


def some_samples(count: int = 23) -> list[Sample]:
    draw = random.Random(0)
    return [
        sample(draw.randint(1, 9), draw.randint(1, 9), gate=draw.random() < 0.4, weight=draw.random())
        for _ in range(count)
    ]


def step_of(
    samples: list[Sample],
    *,
    regularized: bool = True,
    limit: Limit = FOUR,
    rank: int = 0,
    size: int = 1,
    packed: bool = False,
) -> StepBatch:
    return build_step(
        samples,
        regularized=regularized,
        limit=limit,
        layout=PackingLayout(packed=packed, data=rank, data_size=size),
        device=CPU,
    )


def test_rows_point_at_the_position_before_each_response_token() -> None:
    batch = collate([sample(3, 2, gate=True), sample(1, 4)], PADDED)
    following = batch.student.tokens_BS.flatten()[batch.student.rows_T + 1]
    assert following.tolist() == batch.labels_T.tolist() == [300, 301, 300, 301, 302, 303]
    assert batch.student.tokens_BS[0].tolist() == [100, 101, 102, 300, 301]
    assert batch.teacher is not None
    assert batch.teacher.tokens_BS.shape == (1, 11)
    assert batch.teacher.tokens_BS.flatten()[batch.teacher.rows_T + 1].tolist() == [300, 301]
    assert batch.gated_rows_G.tolist() == [0, 1]
    assert batch.gates_T.tolist() == [1, 1, 0, 0, 0, 0]
    assert batch.advantages_T.tolist() == [1, 1, -1, -1, -1, -1]


def test_corrections_go_to_the_tokens_of_their_own_response() -> None:
    batch = collate([sample(3, 2, gate=True), sample(1, 4)], PADDED)
    assert batch.sequence_T.tolist() == [0, 0, 1, 1, 1, 1]
    old_T = batch.rollout_logprobs_T + torch.tensor([0.4, 0.8, 0.0, 0.1, -0.1, 0.0])
    config = ObjectiveConfig(correction="truncate", correction_level="sequence", correction_bound=9.0)
    here, elsewhere = with_corrections([dataclasses.replace(batch, old_logprobs_T=old_T), batch], config)
    assert here.corrections_T is not None
    torch.testing.assert_close(here.corrections_T, torch.tensor([0.6, 0.6, 0.0, 0.0, 0.0, 0.0]).exp())
    assert elsewhere.corrections_T is None  # a pipeline stage without log-probs computes no loss
    assert here.emptied().corrections_T is not None and here.emptied().num_tokens == 0


def test_without_an_open_gate_there_is_no_teacher() -> None:
    assert collate([sample(3, 2)], PADDED).teacher is None


def test_padded_lengths_are_multiples() -> None:
    batch = collate([sample(3, 2, gate=True)], PackingLayout(packed=False, multiple=4))
    assert batch.student.tokens_BS.shape == (1, 8)
    assert batch.teacher is not None
    assert batch.teacher.tokens_BS.shape == (1, 12)


LAYOUTS = (
    PackingLayout(multiple=2),
    PackingLayout(packed=False, multiple=2),
    PackingLayout(multiple=3, context=1, context_size=2),
)


@pytest.mark.parametrize(
    "empty",
    [
        batch
        for layout in LAYOUTS
        for batch in (collate([], layout), collate([sample(3, 2, gate=True)], layout).emptied())
    ],
)
def test_an_empty_micro_batch_has_tokens_to_run_and_none_to_learn_from(empty: MicroBatch) -> None:
    assert empty.student.tokens_BS.numel() > 0
    assert empty.num_tokens == 0
    assert empty.student.rows_T.numel() == empty.weights_T.numel() == empty.gated_rows_G.numel() == 0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("micro", [1, 4, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_ranks_share_all_samples_in_equally_many_micro_batches(size: int, micro: int, packed: bool) -> None:
    samples = some_samples()
    steps = [step_of(samples, limit=Limit(micro), packed=packed, rank=rank, size=size) for rank in range(size)]
    assert len({len(step.micro_batches) for step in steps}) == 1
    batches = [batch for step in steps for batch in step.micro_batches]
    assert all(batch.student.count <= micro for batch in batches)
    assert sum(batch.num_tokens for batch in batches) == sum(len(s.response) for s in samples)
    total = sum(s.weight * len(s.response) for s in samples)
    assert sum(float(batch.weights_T.sum()) for batch in batches) == pytest.approx(total, rel=1e-5)
    assert sum(batch.gated_rows_G.numel() for batch in batches) == sum(len(s.response) for s in samples if s.gate)


@pytest.mark.parametrize("size", [1, 2, 5, 30])
@pytest.mark.parametrize("tokens", [1, 40, 75, 10_000])
def test_a_bound_on_tokens_holds_and_ranks_have_equally_many_micro_batches(size: int, tokens: int) -> None:
    """Only a sample that is itself beyond the bound exceeds it, alone."""
    samples = some_samples(60)
    shared = plan(samples, size, Limit(1, tokens), alike=False)
    assert len(shared) == size and len({len(parts) for parts in shared}) == 1
    assert Counter(s for parts in shared for part in parts for s in part) == Counter(samples)
    for part in (part for parts in shared for part in parts):
        assert len(part) <= 1 or sum(s.cost for s in part) <= tokens
    fewest = max(1, *(-(-sum(s.cost for part in parts for s in part) // tokens) for parts in shared))
    assert fewest <= len(shared[0]) <= max(fewest + 2, min(tokens == 1, 1) * len(samples))
    costs = [sum(s.cost for part in parts for s in part) for parts in shared]
    assert max(costs) - min(costs) <= max(s.cost for s in samples)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_bound_on_tokens_counts_what_context_parallel_ranks_pad(size: int) -> None:
    """Sequences of 6 and 8 tokens, each of which fills up to as many as the ranks have chunks."""
    batches = build_step(
        [sample(3, 3, teacher=5, gate=True) for _ in range(16)],
        regularized=True,
        limit=Limit(1, 112),
        layout=PackingLayout(context=1, context_size=size),
        device=CPU,
    ).micro_batches
    sides = [(batch.student.lengths, batch.teacher and batch.teacher.lengths) for batch in batches]
    processed = [sum(student or ()) + sum(teacher or ()) for student, teacher in sides]
    assert max(processed) <= 112 < 2 * min(processed)
    assert sum(batch.student.count for batch in batches) == 16 > len(batches)


def test_a_plan_reads_the_gates_of_a_response_once() -> None:
    """Thousands of long responses, and a try for each number of micro-batches: all ranks wait for this."""

    class Gates(np.ndarray[Any, Any]):
        reads = 0

        def any(self, *args: Any, **kwargs: Any) -> Any:
            Gates.reads += 1
            return super().any(*args, **kwargs)

    samples = [dataclasses.replace(sample(3, 40), gates=np.zeros(40, bool).view(Gates)) for _ in range(30)]
    (parts,) = plan(samples, 1, Limit(1, 60), alike=False)
    assert len(parts) == 30  # no two fit, though two thirds as many micro-batches would hold the tokens
    assert Gates.reads == 30


def test_packed_micro_batches_cost_about_the_same() -> None:
    samples = some_samples(24)
    (even,) = plan(samples, 1, Limit(4), alike=False)
    (alike,) = plan(samples, 1, Limit(4), alike=True)

    def spread(parts: list[list[Sample]]) -> int:
        costs = [sum(s.cost for s in part) for part in parts]
        return max(costs) - min(costs)

    assert spread(even) < max(s.cost for s in samples) < spread(alike)


def test_padded_micro_batches_hold_samples_of_like_length() -> None:
    """Whether the teacher reads a sample, too, is no reason to pad it or others."""
    samples = [sample(3, 10 * n, gate=bool(n % 2)) for n in (5, 1, 8, 2, 7, 3, 6, 4)]
    (parts,) = plan(samples, 1, Limit(2), alike=True)
    assert [sorted(len(s.response) // 10 for s in part) for part in parts] == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_ranks_get_like_loads() -> None:
    """The longest is dealt first, and with equal counts no rank is further behind than the longest sample."""
    samples = some_samples(24)
    shares = balance(samples, 4, room=6)
    loads = [sum(s.cost for s in share) for share in shares]
    assert {len(share) for share in shares} == {6}
    assert max(loads) - min(loads) <= max(s.cost for s in samples)
    unbalanced = [sum(s.cost for s in samples[rank::4]) for rank in range(4)]
    assert max(loads) < max(unbalanced)


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("room", [None, 8, 20])
def test_samples_are_dealt_by_cost_to_the_part_of_least_cost(parts: int, room: int | None) -> None:
    """The reference counts a sample's tokens one by one, and looks at all parts for each sample."""
    samples = [dataclasses.replace(one, unit=3) for one in some_samples(24)]
    if room is not None and parts * room < len(samples):
        room = len(samples)

    def cost(one: Sample) -> int:
        sides = [one.student_prompt, one.teacher_prompt] if any(one.gates) else [one.student_prompt]
        return sum(math.ceil(sum(1 for _ in [*prompt, *one.response]) / 3) * 3 for prompt in sides)

    expected: list[list[Sample]] = [[] for _ in range(parts)]
    for one in sorted(samples, key=cost, reverse=True):
        open_parts = [part for part in expected if room is None or len(part) < room]
        min(open_parts, key=lambda part: sum(map(cost, part))).append(one)
    assert balance(samples, parts, room=room) == expected


def group(rewards: list[float], lengths: list[int]) -> ScoredGroup:
    prompt = Prompt("p", (1, 2), (3, 4, 5), "answer")
    completions = tuple(make_completion((7,) * n, (-1.0,) * n, "stop", 0, "") for n in lengths)
    mean = sum(rewards) / len(rewards)
    return ScoredGroup(Group(prompt, completions), tuple(rewards), tuple(r - mean for r in rewards))


def test_the_gate_opens_for_positive_advantages_alone() -> None:
    groups = [group([1, 0], [2, 3]), group([1, 1], [1, 1])]
    assert [s.gate for s in make_samples(groups, ObjectiveConfig(), distill=True)] == [True, False, False, False]
    assert all(s.gate for s in make_samples(groups, ObjectiveConfig(gate=False), distill=True))
    assert not any(s.gate for s in make_samples(groups, ObjectiveConfig(), distill=False))


@pytest.mark.parametrize(
    ("name", "distill_enabled"),
    [
        ("sdpg", [True, False, False, False]),
        ("grpo", [False] * 4),
        ("dapo", [False] * 4),
        ("rpg", [False] * 4),
        ("rlsd", [True, True, False, False]),
        ("opsd", [True] * 4),
        ("opcd", [True] * 4),
        ("sdpo", [True] * 4),
    ],
)
def test_each_method_has_the_teacher_read_what_it_learns_from(name: Any, distill_enabled: list[bool]) -> None:
    """A group with one right answer of two, and one without advantages."""
    config = ObjectiveConfig(name=name)
    groups = [group([1, 0], [2, 3]), group([1, 1], [1, 1])]
    assert [s.gate for s in make_samples(groups, config, distill=True)] == distill_enabled
    gated = make_samples(groups, ObjectiveConfig(name=name, gate=True), distill=True)
    assert [s.gate for s in gated] == [any(distill_enabled), False, False, False]


def test_a_loss_without_an_outcome_term_learns_from_taught_samples_alone() -> None:
    groups = [group([1, 0], [2, 3])]
    samples = samples_of(groups, ObjectiveConfig(), distill_enabled=lambda advantage: advantage > 0, outcome=False)
    assert [s.advantage for s in samples] == [0, 0]
    (batch,) = step_of(samples, regularized=False).micro_batches
    assert batch.num_tokens == 2 and batch.gates_T.tolist() == [1, 1]
    assert (batch.weights_T / batch.num_tokens).tolist() == pytest.approx([1 / 5] * 2)


STOP, OTHER_STOP = 50, 51


def stopping(rewards: list[float], responses: list[tuple[int, ...]]) -> ScoredGroup:
    """A group of given responses."""
    scored = group(rewards, [len(tokens) for tokens in responses])
    completions = tuple(
        dataclasses.replace(completion, tokens=np.array(tokens, np.int32))
        for completion, tokens in zip(scored.group.completions, responses, strict=True)
    )
    return dataclasses.replace(scored, group=Group(scored.group.prompt, completions))


RESPONSES: list[tuple[int, ...]] = [(7, STOP, 8, OTHER_STOP), (7, 8, STOP), (STOP,), (9,)]
REWARDS = [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("distil_stops", "stop_ids", "expected"),
    [
        (True, (STOP, OTHER_STOP), [[1, 1, 1, 1], [0, 0, 0], [1], [1]]),
        (False, (STOP, OTHER_STOP), [[1, 0, 1, 0], [0, 0, 0], [0], [1]]),
        (False, (OTHER_STOP,), [[1, 1, 1, 0], [0, 0, 0], [1], [1]]),
        (False, (), [[1, 1, 1, 1], [0, 0, 0], [1], [1]]),
    ],
)
def test_stop_tokens_need_not_be_distilled(
    distil_stops: bool, stop_ids: tuple[int, ...], expected: list[list[int]]
) -> None:
    groups = [stopping(REWARDS, RESPONSES)]
    config = ObjectiveConfig(distill_stop_tokens=distil_stops)
    samples = make_samples(groups, config, distill=True, stop_ids=stop_ids)
    assert [list(map(int, s.gates)) for s in samples] == expected
    # A response without anything to distil needs no teacher.
    assert [s.gate for s in samples] == [any(gates) for gates in expected]
    closed = make_samples(groups, config, distill=False, stop_ids=stop_ids)
    assert not any(gate for s in closed for gate in s.gates)


def test_stop_tokens_are_left_out_of_the_teachers_rows_and_stay_in_the_loss() -> None:
    groups = [stopping(REWARDS, RESPONSES)]
    config = ObjectiveConfig(distill_stop_tokens=False)
    batch = collate(make_samples(groups, config, distill=True, stop_ids=(STOP, OTHER_STOP)), PADDED)
    assert batch.labels_T.tolist() == [token for tokens in RESPONSES for token in tokens]
    assert batch.gates_T.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1]
    assert batch.gated_rows_G.tolist() == [0, 2, 8]
    assert batch.weights_T.min() > 0 and batch.num_tokens == 9
    # The teacher reads whole responses, those with a gate alone, and hands over a row for each gate.
    assert batch.teacher is not None and batch.teacher.tokens_BS.shape[0] == 2
    assert batch.teacher.tokens_BS[0].tolist() == [3, 4, 5, 7, STOP, 8, OTHER_STOP]
    following = batch.teacher.tokens_BS.flatten()[batch.teacher.rows_T + 1]
    assert following.tolist() == batch.labels_T[batch.gated_rows_G].tolist() == [7, 8, 9]
    assert batch.student.rows_T.numel() == 9


def test_a_micro_batch_whose_open_gates_are_all_stop_tokens_has_no_teacher() -> None:
    groups = [stopping([1.0, 0.0], [(STOP,), (8, 9)])]
    samples = make_samples(groups, ObjectiveConfig(distill_stop_tokens=False), distill=True, stop_ids=(STOP,))
    batch = collate(samples, PADDED)
    assert batch.teacher is None and batch.gated_rows_G.numel() == 0


def test_distill_scale_counts_gated_tokens_alone() -> None:
    """9 tokens in all; 6 of responses with a positive advantage, 3 of which are stop tokens."""
    groups = [stopping(REWARDS, RESPONSES)]
    scales = {}
    for distil_stops in (True, False):
        config = ObjectiveConfig(distill_stop_tokens=distil_stops)
        scales[distil_stops] = step_of(make_samples(groups, config, distill=True, stop_ids=(STOP, OTHER_STOP)))
    assert scales[True].distill_scale == pytest.approx(9 / 6)
    assert scales[False].distill_scale == pytest.approx(9 / 3)


def test_distill_scale_weighs_gated_tokens_as_the_loss_does() -> None:
    samples = [
        dataclasses.replace(sample(2, 3, weight=2.0), gates=np.array([True, False, True])),
        dataclasses.replace(sample(2, 4, weight=0.5), gates=np.array([False, False, False, True])),
    ]
    assert step_of(samples).distill_scale == pytest.approx((3 * 2 + 4 * 0.5) / (2 * 2 + 0.5))


def test_weights_follow_the_aggregation_over_the_whole_step() -> None:
    groups = [group([1, 0], [2, 6]), group([1, 0], [4, 4])]
    weights = [s.weight for s in make_samples(groups, ObjectiveConfig(aggregation="sequence-mean"), distill=True)]
    assert weights == pytest.approx([16 / 4 / 2, 16 / 4 / 6, 16 / 4 / 4, 16 / 4 / 4])


def test_samples_that_teach_nothing_are_left_out_and_the_mean_stays_that_over_all() -> None:
    dead = dataclasses.replace(sample(5, 6), advantage=0.0)
    live = [sample(2, 3, gate=True), sample(4, 5)]
    step = step_of([live[0], dead, live[1]], regularized=False)
    (batch,) = step.micro_batches
    assert batch.num_tokens == 8
    # sum(weight * loss) / tokens left = sum(loss) / all tokens
    assert (batch.weights_T / batch.num_tokens).tolist() == pytest.approx([1 / 14] * 8)
    assert step.distill_scale == pytest.approx(14 / 3)
    assert step_of([dead], regularized=False).micro_batches[0].num_tokens == 0
    assert sum(b.num_tokens for b in step_of([live[0], dead], regularized=True).micro_batches) == 9


def test_distill_scale_turns_a_mean_over_all_tokens_into_one_over_gated_ones() -> None:
    step = step_of([sample(2, 3, gate=True), sample(2, 9)])
    assert step.distill_scale == pytest.approx(12 / 3)
    assert step_of([sample(2, 3)]).distill_scale == 1.0
