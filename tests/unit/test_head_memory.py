"""Memory that the head takes beside its inputs: it grows with rows x hidden size, never with rows x vocabulary.

Measured by torch's profiler, to which the allocator reports every allocation and release. That counts bytes exactly,
scratch inside operators included, while a process' resident size counts pages, and changes with allocator and machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sdpg_megatron.head import (
    Divergence,
    HeadOptions,
    HeadTerms,
    TeacherRows,
    VocabShard,
    head_logprobs,
    head_loss,
    head_terms,
    logits_terms,
)
from tests.head_twin import DIVERGENCES

HIDDEN = 64
FLOAT = 4
SIZES: dict[str, int] = {"chunk_rows": 32, "tile_columns": 128}
NUMBERS = 400
"""Bytes a row that go to statistics, terms, row numbers and their gradients: less than 100 floats."""


@dataclass(frozen=True)
class Usage:
    """Bytes beside what was there before."""

    peak: int
    left: int
    """What the call's results keep alive."""


def usage(call: Callable[[], Any]) -> Usage:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    kineto: Any = found.profiler
    changes = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    assert changes, "the profiler saw no allocation"
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    del result
    return Usage(peak, held)


def growth(make: Callable[[int], Callable[[], Any]]) -> tuple[float, float]:
    """Bytes a further row adds, to the peak and to what is left. Runs once before, for what is made once."""
    make(96)()
    few, many = (usage(make(rows)) for rows in (96, 352))
    return (many.peak - few.peak) / 256, (many.left - few.left) / 256


def leaves(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TH, teacher_TH = torch.randn(2, rows, HIDDEN, generator=generator)
    weight_VH = torch.randn(columns, HIDDEN, generator=generator) / HIDDEN**0.5
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), torch.arange(rows) % columns, teacher_TH


def loss(terms: HeadTerms, at_C: torch.Tensor) -> torch.Tensor:
    assert terms.divergence_T is not None
    return terms.divergence_T - terms.logprob_T - terms.entropy_T


def both_passes(schedule: Any, columns: int, divergence: Divergence, **more: Any) -> Callable[[int], Callable[[], Any]]:
    options = HeadOptions(schedule=schedule, divergence=divergence, **SIZES, **more)

    def make(rows: int) -> Callable[[], Any]:
        hidden_TH, weight_VH, labels_T, teacher_TH = leaves(rows, columns)

        def call() -> None:
            teacher = TeacherRows(teacher_TH, torch.arange(rows))
            vocab = VocabShard(0, columns, None)
            total, _ = head_loss(hidden_TH, weight_VH, labels_T, loss, vocab=vocab, teacher=teacher, options=options)
            total.backward()

        return call

    return make


@pytest.mark.parametrize("schedule", ["grad_in_forward", "recompute"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "top3_jsd"])
def test_both_passes_grow_with_rows_by_hidden_size(schedule: str, name: str) -> None:
    narrow, wide = (growth(both_passes(schedule, columns, DIVERGENCES[name]))[0] for columns in (512, 2048))
    assert narrow == wide
    # Rows in order, their gradient, and the same once more in the caller's order.
    assert HIDDEN * FLOAT <= narrow <= 4 * HIDDEN * FLOAT + NUMBERS
    assert narrow < 512 * FLOAT


def test_the_meter_sees_a_row_of_logits() -> None:
    """The same measurement of the obvious way, which keeps at least logits, log-probs and a gradient of each."""

    def make(rows: int) -> Callable[[], Any]:
        hidden_TH, weight_VH, labels_T, _ = leaves(rows, 512)

        def call() -> None:
            logits_TV = hidden_TH @ weight_VH.T
            torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum").backward()

        return call

    assert growth(make)[0] >= 2 * 512 * FLOAT


@pytest.mark.parametrize("columns", [512, 2048])
def test_what_waits_for_the_backward_pass(columns: int) -> None:
    """`recompute` keeps some numbers a row; `grad_in_forward` both gradients instead, of hidden rows and matrix."""

    def forward(schedule: Any, rows: int) -> Callable[[], Any]:
        hidden_TH, weight_VH, labels_T, teacher_TH = leaves(rows, columns)
        options = HeadOptions(schedule=schedule, **SIZES)
        teacher = TeacherRows(teacher_TH, torch.arange(rows))
        vocab = VocabShard(0, columns, None)
        return lambda: head_loss(hidden_TH, weight_VH, labels_T, loss, vocab=vocab, teacher=teacher, options=options)

    assert growth(lambda rows: forward("recompute", rows))[1] <= NUMBERS
    gradients = growth(lambda rows: forward("grad_in_forward", rows))[1]
    assert HIDDEN * FLOAT <= gradients <= 2 * HIDDEN * FLOAT + NUMBERS
    kept = usage(forward("grad_in_forward", 96)).left - 96 * (2 * HIDDEN * FLOAT + NUMBERS)
    assert kept <= columns * HIDDEN * FLOAT
    assert usage(forward("recompute", 96)).left <= 96 * NUMBERS


def test_logits_are_gone_before_the_matrix_gradient_takes_memory() -> None:
    """With one group of all rows, the logits of a chunk and the gradients of all rows are the peak."""
    rows, columns = 96, 2048
    call = both_passes("grad_in_forward", columns, DIVERGENCES["reverse_kl"], group_rows=rows)(rows)
    call()
    logits, kept = 2 * SIZES["chunk_rows"] * columns * FLOAT, rows * columns * FLOAT
    matrix = columns * HIDDEN * FLOAT
    beside = rows * (8 * HIDDEN * FLOAT + NUMBERS) + 16 * SIZES["chunk_rows"] * SIZES["tile_columns"] * FLOAT
    assert beside < matrix, "or the test could not tell"
    assert logits + kept <= usage(call).peak <= logits + kept + beside


def test_terms_without_a_graph_need_some_numbers_a_row() -> None:
    def make(rows: int) -> Callable[[], Any]:
        hidden_TH, weight_VH, labels_T, _ = leaves(rows, 2048)
        vocab, options = VocabShard(0, 2048, None), HeadOptions(**SIZES)
        return lambda: head_logprobs(hidden_TH, weight_VH, labels_T, vocab=vocab, options=options)

    assert growth(make)[0] <= NUMBERS


@pytest.mark.parametrize("schedule", ["grad_in_forward", "recompute"])
def test_a_loss_without_a_graph_makes_no_gradients(schedule: Any) -> None:
    """The rows in order of their teachers, and numbers; nothing of the matrix's size."""
    options = HeadOptions(schedule=schedule, **SIZES)
    vocab = VocabShard(0, 2048, None)

    def make(rows: int) -> Callable[[], Any]:
        hidden_TH, weight_VH, labels_T, teacher_TH = leaves(rows, 2048)
        teacher = TeacherRows(teacher_TH, torch.arange(rows))

        @torch.no_grad()
        def call() -> None:
            head_loss(hidden_TH, weight_VH, labels_T, loss, vocab=vocab, teacher=teacher, options=options)

        return call

    assert growth(make)[0] <= HIDDEN * FLOAT + NUMBERS
    assert usage(make(96)).peak < 2048 * HIDDEN * FLOAT


def test_bfloat16_is_widened_a_tile_at_a_time() -> None:
    """Nowhere is there a float32 copy of the matrix beside its gradient, let alone of the logits."""
    hidden_TH, weight_VH, labels_T, teacher_TH = leaves(64, 4096)
    narrow_VH = weight_VH.detach().bfloat16().requires_grad_()
    vocab, options = VocabShard(0, 4096, None), HeadOptions(chunk_rows=16, tile_columns=128)

    def call() -> None:
        rows_TH = hidden_TH.detach().bfloat16().requires_grad_()
        teacher = TeacherRows(teacher_TH, torch.arange(64))
        terms = head_terms(rows_TH, narrow_VH, labels_T, vocab=vocab, teacher=teacher, options=options)
        loss(terms, labels_T).sum().backward()

    call()
    narrow_VH.grad = None
    gradient = 4096 * HIDDEN * (FLOAT + 2)  # summed up in float32, handed on in bfloat16
    assert usage(call).peak <= gradient + 4096 * HIDDEN * FLOAT / 2


def test_given_logits_cost_their_gradient() -> None:
    """Beside it, no tensor of the logits' size."""
    columns = 2048
    options = HeadOptions(**SIZES)

    def make(rows: int) -> Callable[[], Any]:
        student_TV, teacher_TV = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0))
        student_TV.requires_grad_()

        def call() -> None:
            vocab = VocabShard(0, columns, None)
            labels_T = torch.zeros(rows, dtype=torch.int64)
            terms = logits_terms(student_TV, labels_T, vocab=vocab, teacher_GV=teacher_TV, options=options)
            torch.autograd.grad(loss(terms, labels_T).sum(), student_TV)

        return call

    added = growth(make)[0]
    assert columns * FLOAT <= added <= columns * FLOAT + NUMBERS
