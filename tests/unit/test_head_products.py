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

from sdpg_megatron.head.products import multiply, wide
from tests.head_twin import Problem, ask, dense, make_problem

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
@pytest.mark.parametrize("narrow", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_summed_in_a_wide_type(narrow: torch.dtype, add: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left_MK, right_KN = (torch.randn(size, generator=generator).to(narrow) for size in ((5, 300), (300, 7)))
    out_MN = torch.ones(5, 7, dtype=wide(narrow))
    expected_MN = left_MK.double() @ right_KN.double() + (1 if add else 0)
    assert multiply(left_MK, right_KN, out_MN, add=add) is out_MN
    assert_close(out_MN.double(), expected_MN, rtol=1e-5, atol=1e-5)
