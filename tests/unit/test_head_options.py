"""Sizes that follow from memory, and which kernels are taken."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from sdpg_megatron import head
from sdpg_megatron.head import HeadOptions, VocabShard, tile
from sdpg_megatron.head.chunked import kernels
from sdpg_megatron.head.options import CPU_BYTES, CPU_ROWS, LEAST_ROWS
from tests.head_twin import assert_answers, dense, make_problem, package

CPU = torch.device("cpu")
ALONE = VocabShard(0, 1 << 17, None)
MIB = 1 << 20


def matrix(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(columns, 1, dtype=dtype)


def test_rows_fit_the_memory_that_is_free() -> None:
    """The logits of student and teacher, four bytes each, take at most a quarter of it."""
    columns = 1 << 17
    found = {}
    for free in (256 * MIB, 512 * MIB, 1024 * MIB, 1 << 40):
        rows = HeadOptions().fitted(matrix(columns), ALONE, free_bytes=free).chunk_rows
        assert rows is not None and rows & (rows - 1) == 0
        assert rows * 2 * 4 * columns <= free / 4 or rows == LEAST_ROWS
        found[free] = rows
    assert list(found.values()) == sorted(found.values())
    assert found[1024 * MIB] > found[512 * MIB] > LEAST_ROWS
    assert CPU_BYTES / 4 < found[1 << 40] * 2 * 4 * columns <= CPU_BYTES


def test_little_memory_still_gives_some_rows_and_much_no_more_than_help() -> None:
    assert HeadOptions().fitted(matrix(1 << 17), ALONE, free_bytes=0).chunk_rows == LEAST_ROWS
    assert HeadOptions().fitted(matrix(1), ALONE, free_bytes=1 << 50).chunk_rows == CPU_ROWS
    assert HeadOptions().fitted(matrix(0), ALONE, free_bytes=1 << 50).chunk_rows == CPU_ROWS


def test_more_rows_fit_where_no_logits_are_held() -> None:
    free = 64 * MIB
    held = HeadOptions(schedule="grad_in_forward").fitted(matrix(1 << 17), ALONE, free_bytes=free).chunk_rows
    made_anew = HeadOptions(schedule="recompute").fitted(matrix(1 << 17), ALONE, free_bytes=free).chunk_rows
    assert held is not None and made_anew is not None and made_anew > 4 * held


def test_float64_takes_twice_the_memory() -> None:
    free = 1024 * MIB
    single = HeadOptions().fitted(matrix(1 << 16), ALONE, free_bytes=free).chunk_rows
    double = HeadOptions().fitted(matrix(1 << 16, torch.float64), ALONE, free_bytes=free).chunk_rows
    assert single is not None and double == single // 2


def test_rows_that_were_given_stay() -> None:
    assert HeadOptions(chunk_rows=3).fitted(matrix(9), ALONE, free_bytes=0).chunk_rows == 3


def test_what_is_free_is_looked_up() -> None:
    rows = HeadOptions().fitted(matrix(1 << 17), ALONE).chunk_rows
    assert rows is not None and LEAST_ROWS <= rows <= CPU_ROWS


@pytest.mark.parametrize("columns", [0, 1, 24, 1 << 17])
def test_all_sizes_are_chosen_in_the_end(columns: int) -> None:
    for schedule in ("recompute", "grad_in_forward"):
        options = HeadOptions(schedule=schedule).sized(matrix(columns))  # type: ignore[arg-type]
        assert options.chunk_rows is not None and options.chunk_rows >= 1
        assert options.tile_columns is not None and options.tile_columns >= 1
    given = HeadOptions(chunk_rows=3, tile_columns=7)
    assert given.sized(matrix(columns)) == given


# --- kernels


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton is not installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sdpg_megatron.head.tile_triton", raising=False)
    monkeypatch.delattr(head, "tile_triton", raising=False)


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("way", ["terms", "grad_in_forward", "logits"])
def test_triton_that_is_asked_for_and_missing_is_an_error(way: str) -> None:
    with pytest.raises(ImportError, match=r"found no triton, expected it for kernels=triton\. Fix: pip install triton"):
        package(way, make_problem(), kernels="triton")


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_triton_that_is_not_asked_for_may_be_missing(device: str) -> None:
    assert kernels(HeadOptions(), torch.device(device)) is tile


def test_plain_torch_can_be_asked_for() -> None:
    assert kernels(HeadOptions(kernels="torch"), torch.device("cuda")) is tile
    assert kernels(HeadOptions(kernels="auto"), CPU) is tile


@pytest.mark.parametrize("option", ["chunk_rows", "tile_columns"])
def test_a_size_may_be_left_open(option: str) -> None:
    sizes: dict[str, Any] = {option: None}
    problem = make_problem()
    assert_answers(package("grad_in_forward", problem, **sizes), dense(problem), rtol=1e-11, atol=1e-11)
