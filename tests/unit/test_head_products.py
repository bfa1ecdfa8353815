"""Where the gradient of the vocabulary matrix goes: to autograd, or into Megatron's buffer.

What Megatron's wrapper makes of it is in tests/dist/test_head_megatron.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sdpg_megatron.head import VocabShard, gradients
from sdpg_megatron.head.autograd import head_of_rows
from sdpg_megatron.head.gradients import Gradients, WeightGradient, group_size
from sdpg_megatron.head.products import multiply, wide
from tests.head_twin import Problem, ask, dense, make_problem, options_of

HIDDEN_WAYS = ("terms", "recompute", "grad_in_forward")
ways = pytest.mark.parametrize("way", HIDDEN_WAYS)
EXACT = {"rtol": 1e-11, "atol": 1e-11}


@dataclass
class Found:
    main_VH: Tensor
    autograd_VH: Tensor | None
    added: bool | None
    """The flag that tells Megatron's wrapper not to add what autograd was given."""


def run(way: str, problem: Problem, main_VH: Tensor | None, *, zero_out: bool = False, flag: bool = True) -> Found:
    """Twice the loss, backward, with `main_VH` as the buffer."""
    weight_VH: Any = torch.nn.Parameter(problem.weight_VH.clone())
    if main_VH is not None:
        weight_VH.main_grad = main_VH
    if flag:
        weight_VH.grad_added_to_main_grad = False
    if zero_out:
        weight_VH.zero_out_wgrad = True
    _, loss = ask(way, replace(problem, weight_VH=weight_VH), main_grad=True)
    (2 * loss).backward()
    added = weight_VH.grad_added_to_main_grad if flag else None
    return Found(torch.empty(0) if main_VH is None else main_VH, weight_VH.grad, added)


@ways
def test_a_buffer_is_added_to(way: str) -> None:
    problem = make_problem()
    before_VH = torch.randn(24, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = run(way, problem, before_VH.clone())
    assert_close(found.main_VH, before_VH + 2 * dense(problem).weight_grad_VH, **EXACT)
    assert found.added is True
    assert found.autograd_VH is not None and found.autograd_VH.shape == (24, 6)


@ways
def test_beside_a_tied_embedding_autograd_gets_zeros(way: str) -> None:
    """The embedding's gradient is added to them, and Megatron adds the sum to the buffer."""
    problem = make_problem()
    found = run(way, problem, torch.zeros(24, 6, dtype=torch.float64), zero_out=True)
    assert found.autograd_VH is not None and found.autograd_VH.eq(0).all()
    assert_close(found.main_VH, 2 * dense(problem).weight_grad_VH, **EXACT)


@ways
def test_outside_the_wrapper_nothing_stands_in(way: str) -> None:
    problem = make_problem()
    found = run(way, problem, torch.zeros(24, 6, dtype=torch.float64), flag=False)
    assert found.autograd_VH is None
    assert_close(found.main_VH, 2 * dense(problem).weight_grad_VH, **EXACT)


@ways
def test_without_a_buffer_autograd_gets_the_gradient(way: str) -> None:
    problem = make_problem()
    found = run(way, problem, None)
    assert_close(found.autograd_VH, 2 * dense(problem).weight_grad_VH, **EXACT)
    assert found.added is False


def test_a_buffer_is_left_alone_unless_asked_for() -> None:
    problem = make_problem()
    weight_VH: Any = torch.nn.Parameter(problem.weight_VH.clone())
    weight_VH.main_grad, weight_VH.grad_added_to_main_grad = torch.zeros(24, 6, dtype=torch.float64), False
    _, loss = ask("grad_in_forward", replace(problem, weight_VH=weight_VH), main_grad=False)
    loss.backward()
    assert weight_VH.main_grad.eq(0).all() and weight_VH.grad_added_to_main_grad is False
    assert_close(weight_VH.grad, dense(problem).weight_grad_VH, **EXACT)


@ways
@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
def test_the_buffers_type_is_the_only_rounding(way: str, buffer: torch.dtype) -> None:
    """bfloat16 weights: a float32 buffer gets what was never rounded to bfloat16, a bfloat16 buffer rounds once."""
    narrow = make_problem(rows=40, columns=200, valid=190, hidden=16, gated=20).to(torch.bfloat16)
    expected_VH = 2 * dense(narrow).weight_grad_VH
    found_VH = run(way, narrow, torch.zeros(200, 16, dtype=buffer)).main_VH
    rounding = {"rtol": 2**-8, "atol": 1e-4} if buffer == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    assert_close(found_VH.double(), expected_VH, **rounding)
    once_VH = expected_VH.to(torch.bfloat16).double()
    assert buffer == torch.bfloat16 or not torch.allclose(once_VH, expected_VH, **rounding)


@ways
def test_only_tokens_of_a_padded_matrix_get_a_gradient(way: str) -> None:
    found = run(way, make_problem().padded(torch.nan), torch.full((24, 6), 3.0, dtype=torch.float64))
    assert found.main_VH[21:].eq(3).all()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_summed_in_a_wide_type(narrow: torch.dtype, factor: float, add: bool) -> None:
    """What is not added to is not read: it may be NaN."""
    generator = torch.Generator().manual_seed(0)
    left_MK, right_KN = (torch.randn(size, generator=generator).to(narrow) for size in ((5, 300), (300, 7)))
    out_MN = torch.full((5, 7), 1 if add else torch.nan, dtype=wide(narrow))
    expected_MN = factor * (left_MK.double() @ right_KN.double()) + (1 if add else 0)
    assert multiply(left_MK, right_KN, out_MN, add=add, factor=factor) is out_MN
    assert_close(out_MN.double(), expected_MN, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_rows", [0, 8])
def test_rows_of_logits_and_gradients_start_where_cublas_is_fast(group_rows: int) -> None:
    """21 columns: 64 numbers from one row to the next. Of numbers of 2 bytes, 16 bytes are 8."""
    problem = make_problem(gated=11)
    options = options_of(problem, schedule="grad_in_forward", tile_columns=21, group_rows=group_rows).sized(
        problem.weight_VH
    )
    inputs = problem.hidden_TH, problem.weight_VH, problem.teacher_GH, None, problem.labels_T, problem.rows_G
    vocab = VocabShard(0, problem.valid, None)
    head, ordered_TH = head_of_rows(*inputs, vocab, options, held=True)
    kept = Gradients(ordered_TH, problem.weight_VH, vocab, options, (True, True), deferred=True)
    kept.narrow = True  # as with bfloat16 weights on a GPU
    rows = head.chunks()[0]
    head.logits.begin(rows)
    for made in (*head.logits.tile(slice(0, 21)), kept._room(rows, slice(0, 21))):
        assert made is not None and made.shape == (4, 21) and made.stride() == (64, 1)


# --- how often the matrix's gradient, the largest tensor of all, is read and written


class Passes(TorchDispatchMode):
    """Names of the operators that write so many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if isinstance(result, Tensor) and result.numel() == self.numbers and not view and "empty" not in name:
            self.found.append(name)
        return result


PRODUCTS = ("mm", "addmm")


@pytest.mark.parametrize("group_rows", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_sum_is_written_once_a_product_and_once_at_the_end(group_rows: int, dtype: torch.dtype, fused: bool) -> None:
    """11 rows without a teacher: in place two chunks, of 8 rows and of 3, and so in groups of up to 8 rows."""
    problem = make_problem(valid=24, gated=0).to(dtype)
    weight_VH: Any = torch.nn.Parameter(problem.weight_VH.clone())
    if fused:
        weight_VH.main_grad = torch.zeros(24, 6, dtype=wide(dtype))
    leaf = replace(problem, weight_VH=weight_VH)
    with Passes(24 * 6) as passes:
        _, loss = ask("grad_in_forward", leaf, main_grad=fused, tile_columns=24, group_rows=group_rows)
        forward = list(passes.found)
        loss.backward()
    assert [name for name in forward if name in PRODUCTS] == ["mm", "addmm"]
    assert set(forward) <= {*PRODUCTS, "_to_copy"}
    assert passes.found[len(forward) :] == (["addcmul"] if fused else ["mul"])


SIZES = [
    *[(8192, 1024, 8192, 8192), (9000, 1024, 8192, 5120), (20000, 1024, 8192, 7168), (100, 1024, 8192, 100)],
    *[(0, 4, 64, 0), (100, 4, 0, 8), (100, 4, 60, 52), (100, 4, 4, 8)],
]


@pytest.mark.parametrize(("rows", "chunk", "most", "expected"), SIZES)
def test_groups_are_of_even_size(rows: int, chunk: int, most: int, expected: int) -> None:
    assert group_size(rows, chunk, most) == expected


def test_memory_for_the_sum_is_taken_by_its_first_product() -> None:
    weight = WeightGradient(torch.ones(24, 6), fused=False, deferred=True)
    assert weight.own_VH is None
    weight.add(slice(0, 24), torch.ones(2, 24), torch.ones(2, 6))
    assert weight.own_VH is not None and weight.own_VH.eq(2).all()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_sum_is_rounded_once(monkeypatch: pytest.MonkeyPatch, scale: float | None, dtype: torch.dtype) -> None:
    """Also where it is worked on in parts."""
    monkeypatch.setattr(gradients, "SCALED_ROWS", 7)
    hidden_CH = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    gradient_CV = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    weight = WeightGradient(torch.ones(24, 6, dtype=dtype), fused=False, deferred=True)
    weight.add(slice(0, 24), gradient_CV, hidden_CH)
    found_VH = weight.result(None if scale is None else torch.tensor(scale))
    expected_VH = (gradient_CV.T @ hidden_CH * (1.0 if scale is None else scale)).to(dtype)
    assert found_VH is not None and found_VH.dtype == dtype
    assert_close(found_VH, expected_VH, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
