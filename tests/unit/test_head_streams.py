"""Elementwise work on a second stream: ordered by forks and joins alone, without a GPU to run on.

A CPU runs the head's operators one after the other, whatever the streams. `Races` notes which of two made-up streams
each of them was given to and what memory it reads and writes, and follows the waits between the streams: two uses of
the same memory on both streams, at least one of them a write, have to be ordered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdpg_megatron.head import HeadTerms, head_loss
from sdpg_megatron.head import VocabShard as Shard
from sdpg_megatron.head.streams import Streams
from tests.head_twin import DIVERGENCES, Answer, assert_answers, dense, make_problem, options_of, teacher_of
from tests.waits import Waits

MAIN, SECOND = "main", "second"


@dataclass
class Use:
    """Of a range of a tensor's memory, by the operator that was the stream's `number`-th."""

    first: int
    last: int
    write: bool
    stream: str
    number: int
    operator: str


@dataclass
class Memory:
    storage: StorageWeakRef
    owner: str
    """The stream it was allocated on, which may use it anew as soon as it is free."""
    uses: list[Use] = field(default_factory=list)


class Races(TorchDispatchMode):
    """Also stands in for the streams: it says which is current, and is told of waits."""

    def __init__(self) -> None:
        super().__init__()
        self.current = MAIN
        self.found: list[str] = []
        self.given = {MAIN: 0, SECOND: 0}
        self.seen: dict[str, dict[str, int]] = {MAIN: defaultdict(int), SECOND: defaultdict(int)}
        """How many operators of each stream are done before what a stream is given next."""
        self.memory: dict[int, Memory] = {}
        self.operators: dict[str, list[str]] = {MAIN: [], SECOND: []}

    def streams(self) -> Streams:
        return Streams((FakeStream(MAIN, self), FakeStream(SECOND, self)), self.use)

    @contextmanager
    def use(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look_for_freed()
        result = func(*args, **(kwargs or {}))
        if any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns):
            return result  # a view
        self.given[self.current] += 1
        self.seen[self.current][self.current] = self.given[self.current]
        self.operators[self.current].append(func._schema.name)
        written = {
            id(value)
            for argument, value in [
                *zip(func._schema.arguments, args, strict=False),
                *((a, (kwargs or {}).get(a.name)) for a in func._schema.arguments if a.name in (kwargs or {})),
            ]
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        empty = "empty" in func._schema.name
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and not empty:
                self.note(value, id(value) in written, func._schema.name)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value, not empty, func._schema.name)
        return result

    def note(self, value: Tensor, write: bool, operator: str) -> None:
        if not value.numel():
            return
        reference = StorageWeakRef(value.untyped_storage())
        memory = self.memory.setdefault(reference.cdata, Memory(reference, self.current))
        first = value.storage_offset() * value.element_size()
        span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        use = Use(first, first + span * value.element_size(), write, self.current, self.given[self.current], operator)
        for before in memory.uses:
            apart = before.last < use.first or use.last < before.first
            ordered = before.number <= self.seen[use.stream][before.stream]
            if not apart and not ordered and (before.write or use.write):
                self.found.append(f"{before.operator} on {before.stream}, then {operator} on {use.stream}")
        memory.uses.append(use)

    def look_for_freed(self) -> None:
        """The owner may hand the memory out again, so that it has to be past all uses."""
        for key in [key for key, memory in self.memory.items() if memory.storage.expired()]:
            memory = self.memory.pop(key)
            late = [use for use in memory.uses if use.number > self.seen[memory.owner][use.stream]]
            self.found += [f"freed on {memory.owner} before {use.operator} on {use.stream}" for use in late]


@dataclass
class FakeStream:
    name: str
    races: Races

    def record_event(self) -> dict[str, int]:
        """How many operators of each stream are done then."""
        return dict(self.races.seen[self.name])

    def wait_event(self, event: dict[str, int]) -> None:
        for stream, number in event.items():
            self.races.seen[self.name][stream] = max(self.races.seen[self.name][stream], number)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


SIZES = {"chunk_rows": 2, "tile_columns": 24, "group_rows": 4, "overlap": True}
"""11 rows, 5 of them with a teacher: three chunks and two, in groups of at most four rows."""


def run(monkeypatch: pytest.MonkeyPatch, name: str = "reverse_kl", **options: Any) -> tuple[Races, Answer]:
    """Forward and backward."""
    problem = make_problem(divergence=DIVERGENCES[name])
    races = Races()
    monkeypatch.setattr(Streams, "of", lambda device, overlap: races.streams() if overlap else Streams(None))
    hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
    leaf = replace(problem, hidden_TH=hidden_TH, weight_VH=weight_VH)
    vocab = Shard(0, problem.valid, None)

    def loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
        assert terms.divergence_T is not None
        upstream_3C = problem.upstream_3T[:, at_C]
        return (upstream_3C * torch.stack((terms.logprob_T, terms.entropy_T, terms.divergence_T))).sum(0)

    with races:
        total, terms = head_loss(
            hidden_TH,
            weight_VH,
            problem.labels_T,
            loss,
            vocab=vocab,
            teacher=teacher_of(leaf, vocab),
            options=options_of(problem, schedule="grad_in_forward", **{**SIZES, **options}),
        )
        gradients = torch.autograd.grad(total, (hidden_TH, weight_VH))
        races.look_for_freed()
    assert terms.divergence_T is not None and terms.teacher_logprob_T is not None
    terms_4T = torch.stack((terms.logprob_T, terms.entropy_T, terms.divergence_T, terms.teacher_logprob_T))
    return races, Answer(terms_4T, *gradients, total.detach())


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "top3_jsd"])
@pytest.mark.parametrize("sizes", [{}, {"group_rows": 100}, {"chunk_rows": 1, "group_rows": 2}, {"tile_columns": 7}])
def test_streams_are_ordered_wherever_they_share_memory(
    monkeypatch: pytest.MonkeyPatch, name: str, sizes: dict[str, int]
) -> None:
    races, answer = run(monkeypatch, name, **sizes)
    assert not races.found
    assert_answers(answer, dense(make_problem(divergence=DIVERGENCES[name])), rtol=1e-11, atol=1e-11)


def test_products_stay_on_the_callers_stream_and_all_else_goes_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five chunks in four groups."""
    races, _ = run(monkeypatch)
    products = [operator for operator in races.operators[MAIN] if operator in ("aten::mm", "aten::addmm")]
    assert len(products) == 5 + 5 + 4
    assert not {"aten::mm", "aten::addmm"} & set(races.operators[SECOND])
    assert races.operators[SECOND].count("aten::exp") >= 5
    assert "aten::exp" not in races.operators[MAIN]


@pytest.mark.parametrize("missing", ["join", "fork"])
def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """What the other tests rest on."""

    def wait_event(stream: FakeStream, event: dict[str, int]) -> None:
        if (stream.name == SECOND) == (missing == "join"):
            wait(stream, event)

    wait = FakeStream.wait_event
    monkeypatch.setattr(FakeStream, "wait_event", wait_event)
    assert run(monkeypatch)[0].found


def test_a_buffer_for_one_chunk_alone_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdpg_megatron.head import autograd, logits

    class Single(logits.Products):
        """The next chunk's logits take the place of those in use."""

        def ahead(self, rows: slice, tiles: Any) -> None:
            self._spare[0].memory = self._now.memory
            super().ahead(rows, tiles)

    monkeypatch.setattr(autograd, "Products", Single)
    assert any("mm on main" in race for race in run(monkeypatch)[0].found)


def test_after_a_loss_that_raises_nothing_is_freed_too_early() -> None:
    races = Races()
    streams = races.streams()
    with races:
        shared_C = torch.ones(3)
        with pytest.raises(RuntimeError, match="of the loss"), streams.fork(streams.mark()):
            shared_C.add_(1)
            raise RuntimeError("of the loss")
        del shared_C
        races.look_for_freed()
    assert races.current == MAIN and not races.found


def test_a_cpu_has_one_stream() -> None:
    streams = Streams.of(torch.device("cpu"), overlap=True)
    with streams.fork(streams.mark()):
        pass
    streams.join()


# --- the host


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("group_rows", [0, 4])
def test_the_host_waits_for_nothing(name: str, group_rows: int) -> None:
    problem = make_problem(divergence=DIVERGENCES[name])
    hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
    vocab = Shard(0, problem.valid, None)

    def loss(terms: HeadTerms, at_C: Tensor) -> Tensor:
        assert terms.divergence_T is not None
        return terms.logprob_T * problem.upstream_3T[0, at_C] + terms.divergence_T + terms.entropy_T

    with Waits() as waits:
        for schedule in ("grad_in_forward", "recompute"):
            total, _ = head_loss(
                hidden_TH,
                weight_VH,
                problem.labels_T,
                loss,
                vocab=vocab,
                teacher=teacher_of(problem, vocab),
                options=options_of(problem, schedule=schedule, group_rows=group_rows, raises=False),
            )
            torch.autograd.grad(total, (hidden_TH, weight_VH))
    assert not waits.found
