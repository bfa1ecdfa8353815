"""The whole head on a GPU: gradients of several chunks in one product, and what the defaults hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.head_baselines import make_problem as make_step
from benchmarks.head_baselines import ours
from sdpg_megatron.head import HeadOptions, VocabShard
from tests.head_twin import DIVERGENCES, Answer, Problem, dense, make_problem, package

pytestmark = pytest.mark.gpu

ROWS, COLUMNS, HIDDEN = 700, 5000, 256


def problem_of(name: str) -> Problem:
    return make_problem(
        rows=ROWS, columns=COLUMNS, valid=COLUMNS - 8, hidden=HIDDEN, gated=500, divergence=DIVERGENCES[name]
    )


def on_gpu(problem: Problem, **options: Any) -> Answer:
    moved = {name: value.cuda() for name, value in vars(problem).items() if isinstance(value, Tensor)}
    found = package("grad_in_forward", replace(problem, **moved), tile_columns=None, **options)
    return Answer(**{name: part.cpu() for name, part in found.parts().items()})


@pytest.mark.parametrize("name", DIVERGENCES)
def test_answers_are_the_twins(name: str) -> None:
    """bfloat16 inputs: terms as in float32, gradients rounded to bfloat16 for each logit and once more in the end."""
    problem = problem_of(name).to(torch.bfloat16)
    expected = dense(problem)
    found = on_gpu(problem, chunk_rows=64, group_rows=256)
    torch.testing.assert_close(found.terms_4T.double(), expected.terms_4T, rtol=1e-4, atol=1e-4)
    for part in ("hidden_grad_TH", "weight_grad_VH"):
        found_part, expected_part = found.parts()[part].double(), expected.parts()[part]
        error = (found_part - expected_part).norm() / expected_part.norm()
        assert error < 2**-7, part


def test_the_defaults_hold_at_most_4_5_gb() -> None:
    """Beyond inputs and the rounded gradient of the matrix, for 8192 tokens of a model of Qwen3-4B's size."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    rows, hidden, columns = 8192, 2560, 151936
    device = torch.device("cuda")
    problem = make_step(rows, hidden, VocabShard(0, columns, None), columns, torch.bfloat16, device)
    options = HeadOptions(schedule="grad_in_forward")
    ours(problem, options)  # what libraries take once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome = ours(problem, options)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak - outcome.weight_grad_VH.nbytes <= 4.5e9
