"""The head's benchmark: every contestant computes the same thing, and the script writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close

from benchmarks import head_baselines
from benchmarks.head import Setting, make_reference, max_error, peak_memory
from benchmarks.head_baselines import (
    CONTESTANTS,
    Outcome,
    Problem,
    make_problem,
    naive,
    prepare_floor,
    public_sdpg,
    weight_rows,
)
from sdpg_megatron.head import VocabShard
from tests.pool import RankPool

ROOT = Path(__file__).parents[2]
ROWS, HIDDEN, VOCAB = 21, 8, 301
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
EXACT_NAMES = ["ours/recompute", "ours/grad_in_forward", "naive", "nemo_rl"]
KEYS = ["name", "T", "H", "V", "tp", "dtype", "seconds", "peak_bytes", "tflops_8THV", "max_error_vs_float64"]


def problem(
    dtype: torch.dtype = torch.float64, vocab: VocabShard | None = None, columns: int = VOCAB, rows: int = ROWS
) -> Problem:
    whole = VocabShard(0, VOCAB, None)
    return make_problem(rows, HIDDEN, vocab or whole, columns, dtype, torch.device("cpu"))


def parts(outcome: Outcome) -> list[Tensor]:
    found = [outcome.loss, outcome.logprob_T, outcome.divergence_T, outcome.hidden_grad_TH, outcome.weight_grad_VH]
    return [part for part in found if part is not None]


def dense(given: Problem) -> list[Tensor]:
    """`parts` by torch's own losses, the teacher's logits being constants."""
    hidden_TH, weight_VH = given.hidden_TH.detach().requires_grad_(), given.weight_VH.detach().requires_grad_()
    logits_TV = hidden_TH @ weight_VH.T
    logq_TV = (given.teacher_TH @ weight_VH.detach().T).log_softmax(1)
    logprob_T = -cross_entropy(logits_TV, given.labels_T, reduction="none")
    divergence_T = kl_div(logq_TV, logits_TV.log_softmax(1), reduction="none", log_target=True).sum(1)
    loss = (-given.advantage_T * logprob_T + 0.1 * divergence_T).mean()
    return [loss, logprob_T, divergence_T, *torch.autograd.grad(loss, (hidden_TH, weight_VH))]


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_baselines, "NEMO_RL_CHUNK", 8)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("name", EXACT_NAMES)
def test_contestants_equal_torchs_own_losses(name: str) -> None:
    given = problem()
    outcome = CONTESTANTS[name].prepare(given)()
    for found_part, expected_part in zip(parts(outcome), dense(given), strict=True):
        assert_close(found_part, expected_part, **EXACT)


def test_public_sdpg_equals_naive_but_for_its_narrow_type() -> None:
    expected = parts(naive(problem()))
    for found_part, expected_part in zip(parts(public_sdpg(problem(), torch.float64)), expected, strict=True):
        assert_close(found_part, expected_part, **EXACT)


def test_public_sdpg_errs_by_its_rounding() -> None:
    given = problem(torch.float32)
    exact, found = naive(given), CONTESTANTS["public_sdpg"].prepare(given)()
    assert exact.logprob_T is not None and found.logprob_T is not None
    # Half a unit in the last place of a logit, in the label's entry and in the sum, and of the log-softmax.
    largest = (given.hidden_TH @ given.weight_VH.T).detach().log_softmax(1).abs().max()
    bound = float(largest) * torch.finfo(torch.bfloat16).eps / 2 * 3
    error = float((found.logprob_T - exact.logprob_T).abs().max())
    assert 1e-4 < error < bound


def test_the_floor_is_the_four_products() -> None:
    given = problem()
    step = prepare_floor(given, buffer_bytes=8 * VOCAB * 8)  # 8 rows of float64
    step()
    outcome = step()  # a second step overwrites the first's outputs
    hidden_TH, weight_VH = given.hidden_TH.detach(), given.weight_VH.detach()
    logits_TV = hidden_TH @ weight_VH.T
    assert_close(outcome.hidden_grad_TH, logits_TV @ weight_VH, **EXACT)
    assert_close(outcome.weight_grad_VH, logits_TV.T @ hidden_TH, **EXACT)
    assert not parts(replace(outcome, hidden_grad_TH=None, weight_grad_VH=None))  # type: ignore[arg-type]


def shard_outcome(name: str) -> tuple[Outcome, int]:
    """On a rank: the outcome, and its first column. The shards are of different sizes."""
    width = -(-VOCAB // dist.get_world_size())
    start = dist.get_rank() * width
    shard = VocabShard(start, VOCAB, dist.group.WORLD)
    return CONTESTANTS[name].prepare(problem(vocab=shard, columns=min(width, VOCAB - start)))(), start


@pytest.mark.dist
@pytest.mark.parametrize("name", EXACT_NAMES)
def test_two_ranks_give_what_one_gives(ranks: RankPool, name: str) -> None:
    whole = naive(problem())
    for outcome, start in ranks.run(shard_outcome, 2, name):
        part_VH = whole.weight_grad_VH[start : start + outcome.weight_grad_VH.shape[0]]
        for found_part, expected_part in zip(
            parts(outcome), parts(replace(whole, weight_grad_VH=part_VH)), strict=True
        ):
            assert_close(found_part, expected_part, **EXACT)


def test_a_shard_holds_the_whole_matrix_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_baselines, "SEED_BLOCK", 16)
    whole_VH = weight_rows(0, 50, HIDDEN, torch.float32)
    assert_close(weight_rows(13, 41, HIDDEN, torch.float32), whole_VH[13:41], rtol=0, atol=0)
    assert len({tuple(row) for row in whole_VH.tolist()}) == 50


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_error_is_against_float64_on_the_same_values(dtype: str) -> None:
    rows = 100
    reference = make_reference(Setting(rows, HIDDEN, VOCAB, 1, dtype, "cpu", 1, 1))
    assert len(set(reference.rows)) == 64
    given = problem(getattr(torch, dtype), rows=rows)
    widened = replace(
        given,
        hidden_TH=given.hidden_TH.detach().double().requires_grad_(),
        weight_VH=given.weight_VH.detach().double().requires_grad_(),
        teacher_TH=given.teacher_TH.double(),
    )
    exact = naive(widened)
    error = max_error(exact, reference)
    assert error is not None and error < 1e-12
    assert exact.divergence_T is not None
    off_T = exact.divergence_T.index_add(0, torch.tensor(reference.rows[-1:]), torch.tensor([0.5]).double())
    assert max_error(replace(exact, divergence_T=off_T), reference) == pytest.approx(0.5)
    assert max_error(replace(exact, divergence_T=None), reference) is None


def test_peak_memory_counts_what_is_freed_again() -> None:
    size = 64 << 20
    with peak_memory(torch.device("cpu")) as extra:
        torch.ones(size, dtype=torch.uint8)
    slack = 8 << 20  # the kernel brings its counter up to date some pages at a time
    assert size - slack < extra[0] < size + slack
    with peak_memory(torch.device("cpu")) as extra:
        pass
    assert extra[0] < slack


def test_those_who_cannot_run_say_why() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "GPU" in str(CONTESTANTS["liger"].missing(cpu, 1))
    assert "ranks" in str(CONTESTANTS["liger"].missing(cuda, 2))
    assert "ranks" in str(CONTESTANTS["public_sdpg"].missing(cpu, 2))
    assert CONTESTANTS["naive"].missing(cpu, 2) is None


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "head.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_the_script_writes_its_results(tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    run = run_script("--rows=64", "--hidden=64", "--vocab=4096", "--repeats=2", "--out", str(out))
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text())
    assert all(list(result) == KEYS for result in results)
    two = [*EXACT_NAMES, "matmul_floor"]
    assert sorted(r["name"] for r in results if r["tp"] == 1) == sorted([*two, "public_sdpg"])
    assert sorted(r["name"] for r in results if r["tp"] == 2) == sorted(two)
    for result in results:
        assert (result["T"], result["H"], result["V"], result["dtype"]) == (64, 64, 4096, "float32")
        assert result["tflops_8THV"] == pytest.approx(8 * 64 * 64 * 4096 / result["seconds"] / 1e12)
        # At the very least a tile of logits; at most a few of all logits, of both matrices and of the threads' stacks.
        assert 1 << 17 < result["peak_bytes"] < 64 << 20
        if result["name"] in EXACT_NAMES:
            assert result["max_error_vs_float64"] < 1e-5
    meta = json.loads((tmp_path / "head.json.meta.json").read_text())
    assert meta["command"].startswith("python benchmarks/head.py --rows=64") and meta["machine"] and meta["date"]
    gpu = ("liger", "liger_chunked")
    assert set(meta["left_out"]) == {"public_sdpg, tp 2", *(f"{name}, tp {tp}" for name in gpu for tp in (1, 2))}
    assert "naive" in run.stdout and "left out: liger, tp 1" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.json.meta.json"]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_a_chunk_takes_few_calls() -> None:
    """On the path of a GPU, where each costs the host some microseconds; 126 before kernels did the work of rows."""
    pytest.importorskip("triton", minversion="3.9")  # the interpreter of older ones is another
    run = run_script("--launches")
    assert run.returncode == 0, run.stderr
    total, *calls = run.stdout.splitlines()
    counts = {name: float(count) for count, name in (line.split() for line in calls)}
    assert float(total.split()[0]) == pytest.approx(sum(counts.values())) and sum(counts.values()) <= 30
    for kernel in ("_measure_row", "_terms", "_coefficients", "_gradient_block"):
        assert counts[f"triton.{kernel}"] == 1
    # Student's and teacher's logits, and the gradient of hidden rows; that of the matrix for several chunks at a time.
    assert counts["aten.mm.out"] == 2 and counts["aten.addmm.out"] < 1


def test_the_script_refuses_an_unknown_name() -> None:
    run = run_script("--names", "naive,nobody")
    assert run.returncode == 2 and "nobody" in run.stderr and "matmul_floor" in run.stderr
