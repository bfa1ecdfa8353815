"""Sizes that follow from memory, the schedule that does, and which kernels are taken."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from sdpg_megatron import head
from sdpg_megatron.head import HeadOptions, VocabShard, rows, tile
from sdpg_megatron.head.chunked import kernels
from sdpg_megatron.head.sizes import AUTO_ROWS, CPU_BYTES, CPU_ROWS, CUDA_BYTES, CUDA_ROWS, LEAST_ROWS, HeadShape
from tests.head_twin import assert_answers, dense, make_problem, package

CPU = torch.device("cpu")
ALONE = VocabShard(0, 1 << 17, None)
MIB = 1 << 20


def matrix(columns: int, dtype: torch.dtype = torch.float32, hidden: int = 1) -> torch.Tensor:
    return torch.empty(columns, hidden, dtype=dtype)


def test_rows_fit_the_memory_that_is_free() -> None:
    """The logits of student and teacher, four bytes each, take at most a quarter of it."""
    columns = 1 << 17
    found = {}
    for free in (256 * MIB, 512 * MIB, 1024 * MIB, 1 << 40):
        chunk = HeadOptions(schedule="grad_in_forward").fitted(matrix(columns), ALONE, free_bytes=free).chunk_rows
        assert chunk is not None and chunk & (chunk - 1) == 0
        assert chunk * 2 * 4 * columns <= free / 4 or chunk == LEAST_ROWS
        found[free] = chunk
    assert list(found.values()) == sorted(found.values())
    assert found[1024 * MIB] > found[512 * MIB] > LEAST_ROWS
    assert CPU_BYTES / 4 < found[1 << 40] * 2 * 4 * columns <= CPU_BYTES


def test_little_memory_still_gives_some_rows_and_much_no_more_than_help() -> None:
    in_forward = HeadOptions(schedule="grad_in_forward")
    assert in_forward.fitted(matrix(1 << 17), ALONE, free_bytes=0).chunk_rows == LEAST_ROWS
    assert HeadOptions().fitted(matrix(1), ALONE, free_bytes=1 << 50).chunk_rows == CPU_ROWS
    assert HeadOptions().fitted(matrix(0), ALONE, free_bytes=1 << 50).chunk_rows == CPU_ROWS


def test_more_rows_fit_where_no_logits_are_held() -> None:
    free = 64 * MIB
    held = HeadOptions(schedule="grad_in_forward").fitted(matrix(1 << 17), ALONE, free_bytes=free).chunk_rows
    made_anew = HeadOptions(schedule="recompute").fitted(matrix(1 << 17), ALONE, free_bytes=free).chunk_rows
    assert held is not None and made_anew is not None and made_anew > 4 * held


def test_float64_takes_twice_the_memory() -> None:
    free, options = 1024 * MIB, HeadOptions(schedule="grad_in_forward")
    single = options.fitted(matrix(1 << 16), ALONE, free_bytes=free).chunk_rows
    double = options.fitted(matrix(1 << 16, torch.float64), ALONE, free_bytes=free).chunk_rows
    assert single is not None and double == single // 2


@pytest.mark.parametrize("schedule", ["auto", "recompute", "grad_in_forward"])
def test_rows_that_were_given_stay(schedule: Any) -> None:
    given = HeadOptions(chunk_rows=3, schedule=schedule)
    for free in (0, 1 << 40):
        assert given.fitted(matrix(9), ALONE, free_bytes=free).chunk_rows == 3


def test_what_is_free_is_looked_up() -> None:
    chunk = HeadOptions().fitted(matrix(1 << 17), ALONE).chunk_rows
    assert chunk is not None and LEAST_ROWS <= chunk <= CPU_ROWS


# --- the schedule


def test_the_faster_schedule_is_chosen_where_it_fits() -> None:
    """Beside the matrix's float32 gradient, of 64 MiB, there is room for a chunk of so many rows, of 1 MiB each."""
    weight_VH, per_row = matrix(1 << 17, hidden=128), 2 * 4 << 17
    least = 4 * ((64 << 20) + AUTO_ROWS["cpu"] * per_row)
    found = [
        HeadOptions().fitted(weight_VH, ALONE, free_bytes=int(free)).schedule for free in (0, least - 4, 1.1 * least)
    ]
    assert found == ["recompute", "recompute", "grad_in_forward"]
    for schedule in ("recompute", "grad_in_forward"):
        assert HeadOptions(schedule=schedule).fitted(weight_VH, ALONE, free_bytes=0).schedule == schedule  # type: ignore[arg-type]


def test_what_was_not_fitted_takes_the_faster_schedule() -> None:
    assert HeadOptions().sized(matrix(9)).schedule == "grad_in_forward"


# --- sizes


@pytest.mark.parametrize("columns", [0, 1, 24, 1 << 17])
def test_all_sizes_are_chosen_in_the_end(columns: int) -> None:
    for schedule in ("auto", "recompute", "grad_in_forward"):
        options = HeadOptions(schedule=schedule).sized(matrix(columns))  # type: ignore[arg-type]
        assert options.chunk_rows is not None and options.chunk_rows >= 1
        assert options.tile_columns is not None and options.tile_columns >= 1
        assert options.group_rows == 0
    given = HeadOptions(chunk_rows=3, tile_columns=7, group_rows=9, schedule="grad_in_forward")
    assert given.sized(matrix(columns)) == given


QWEN3 = HeadShape(columns=151936, hidden=2560, cuda=True, fused=True)
"""Qwen3-4B on one GPU."""


def bytes_of(shape: HeadShape) -> tuple[int, int, int]:
    """Rows of a chunk and of a group by default, and the bytes that they take."""
    budget = shape.default_bytes()
    chunk = shape.chunk_rows("grad_in_forward", budget)
    group = shape.group_rows("grad_in_forward", budget, chunk)
    logits = chunk * 2 * shape.logit_bytes * shape.columns
    return chunk, group, logits + group * shape.gradient_bytes * shape.columns


def test_a_gpus_defaults_for_a_model_of_151936_tokens() -> None:
    """A chunk's logits, and the gradients of 8192 rows in one product: 4.5 GB beside the rounded dW of 0.78 GB."""
    chunk, group, taken = bytes_of(QWEN3)
    assert (chunk, group) == (2048, 8192)
    hidden_rows = 8192 * 2560 * (2 + 4)  # in the head's order, and their gradient
    assert taken + hidden_rows <= 4.5e9 + 2 * 151936 * 2560
    assert QWEN3.tile_columns("grad_in_forward") == 151936


@pytest.mark.parametrize("columns", [1, 1000, 18992, 37984, 75968, 128256, 151936, 262144])
@pytest.mark.parametrize("gradient_bytes", [2, 4])
def test_a_gpus_defaults_fit_and_use_what_is_planned(columns: int, gradient_bytes: int) -> None:
    shape = replace(QWEN3, columns=columns, gradient_bytes=gradient_bytes)
    chunk, group, taken = bytes_of(shape)
    assert taken <= CUDA_BYTES and group >= 4 * chunk and group % chunk == 0
    assert chunk == CUDA_ROWS or taken > CUDA_BYTES / 2


def test_a_gpus_tiles_are_smaller_where_a_tile_needs_scratch() -> None:
    for shape in (replace(QWEN3, fused=False), replace(QWEN3, top_k=True)):
        assert shape.tile_columns("grad_in_forward") == 16384
    assert QWEN3.tile_columns("recompute") == 16384
    assert bytes_of(replace(QWEN3, fused=False))[0] == 1024


# --- kernels


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton is not installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("tile_triton", "rows_triton"):
        monkeypatch.delitem(sys.modules, f"sdpg_megatron.head.{name}", raising=False)
        monkeypatch.delattr(head, name, raising=False)


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("way", ["terms", "grad_in_forward", "logits"])
def test_triton_that_is_asked_for_and_missing_is_an_error(way: str) -> None:
    with pytest.raises(
        ImportError, match=r"found triton not installed, expected it for kernels=triton\. Fix: pip install triton"
    ):
        package(way, make_problem(), kernels="triton")


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_triton_that_is_not_asked_for_may_be_missing(device: str) -> None:
    assert kernels(HeadOptions(), torch.device(device)) == (tile, rows)


def test_plain_torch_can_be_asked_for() -> None:
    assert kernels(HeadOptions(kernels="torch"), torch.device("cuda")) == (tile, rows)
    assert kernels(HeadOptions(kernels="auto"), CPU) == (tile, rows)


@pytest.mark.parametrize("option", ["chunk_rows", "tile_columns"])
def test_a_size_may_be_left_open(option: str) -> None:
    sizes: dict[str, Any] = {option: None}
    problem = make_problem()
    assert_answers(package("grad_in_forward", problem, **sizes), dense(problem), rtol=1e-11, atol=1e-11)
