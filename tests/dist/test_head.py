"""The head over tensor-parallel ranks against its dense float64 twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from sdpg_megatron.errors import NumericsError
from sdpg_megatron.head import HeadOptions, TopK, VocabShard, head_logprobs, logits_terms
from tests.head_twin import (
    DIVERGENCES,
    WAYS,
    Answer,
    Problem,
    ask,
    assert_answers,
    dense,
    dense_of_logits,
    make_problem,
    options_of,
    package,
)
from tests.pool import RankPool

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def shard_of(problem: Problem, bounds: list[int] | None = None) -> tuple[Tensor, VocabShard]:
    """This rank's rows of the matrix, and where they lie: an even part, or what is between two bounds."""
    columns, ranks, rank = problem.weight_VH.shape[0], dist.get_world_size(), dist.get_rank()
    bounds = bounds or [columns * i // ranks for i in range(ranks + 1)]
    vocab = VocabShard(bounds[rank], problem.valid, dist.group.WORLD)
    return problem.weight_VH[bounds[rank] : bounds[rank + 1]].clone(), vocab


def answers(problems: list[Problem], ways: list[str], bounds: list[int] | None = None, **options: Any) -> list[Answer]:
    """Every problem asked in every way, in one job."""
    found = []
    for problem in problems:
        weight_VH, vocab = shard_of(problem, bounds)
        found += [package(way, problem, vocab=vocab, weight_VH=weight_VH, **options) for way in ways]
    return found


def assert_shards(parts: list[Answer], expected: Answer, *, partial: bool) -> None:
    """Terms and loss with the same bits on every rank; the matrix's gradient in shards; and the hidden rows' gradient.

    `partial`: it is a part on each rank, to be summed.
    """
    for found in parts[1:]:
        assert torch.equal(found.terms_4T, parts[0].terms_4T) and torch.equal(found.loss, parts[0].loss)
    hidden = [found.hidden_grad_TH for found in parts]
    assert partial or all(torch.equal(part, hidden[0]) for part in hidden)
    whole = replace(
        parts[0],
        hidden_grad_TH=torch.stack(hidden).sum(0) if partial else hidden[0],
        weight_grad_VH=torch.cat([found.weight_grad_VH for found in parts]),
    )
    assert_answers(whole, expected, **EXACT)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("valid", [21, 24, 5])
def test_shards_agree_with_the_dense_twin(ranks: RankPool, world_size: int, valid: int) -> None:
    """All ways and divergences. With 5 tokens among 24 columns, of four ranks three hold padding alone."""
    questions = [
        make_problem(
            valid=valid, divergence=divergence, temperature=0.6, teacher_temperature=1.5, teacher_hidden=hidden
        )
        for divergence in DIVERGENCES.values()
        for hidden in (None, 4)
    ]
    padded = [problem.padded(torch.nan) for problem in questions]
    found = list(zip(*ranks.run(answers, world_size, padded, list(WAYS)), strict=True))
    for number, problem in enumerate(questions):
        expected = dense(problem)
        for way, parts in zip(WAYS, found[number * len(WAYS) :], strict=False):
            assert_shards(list(parts), expected, partial=way == "logits")


@pytest.mark.parametrize("bounds", [[0, 1, 24], [0, 17, 24], [0, 21, 24], [0, 0, 24], [0, 2, 3, 22, 24]])
def test_shards_of_any_size(ranks: RankPool, bounds: list[int]) -> None:
    """Not what Megatron makes, but nothing here asks for equal shards: one may hold no column at all."""
    questions = [make_problem(divergence=divergence) for divergence in DIVERGENCES.values()]
    found = list(zip(*ranks.run(answers, len(bounds) - 1, questions, ["grad_in_forward"], bounds), strict=True))
    for problem, parts in zip(questions, found, strict=True):
        assert_shards(list(parts), dense(problem), partial=False)


@pytest.mark.parametrize("padding", [0.0, 1e4, torch.nan])
def test_padding_of_any_rank_never_counts(ranks: RankPool, padding: float) -> None:
    """9 tokens among 24 columns: the second of four ranks has 3 of them, the third and fourth none."""
    problem = make_problem(valid=9)
    found = list(zip(*ranks.run(answers, 4, [problem.padded(padding)], list(WAYS)), strict=True))
    for way, parts in zip(WAYS, found, strict=True):
        assert_shards(list(parts), dense(problem), partial=way == "logits")
        assert all(part.weight_grad_VH.eq(0).all() for part in parts[2:])


@pytest.mark.parametrize("sizes", [(1, 1), (3, 4), (256, 5), (None, None)])
def test_sizes_of_chunks_and_tiles_change_nothing(ranks: RankPool, sizes: tuple[int | None, int | None]) -> None:
    """11 rows, and 6 columns on each of four ranks, the last of which has 3 tokens."""
    questions = [make_problem(divergence=DIVERGENCES[name]) for name in ("reverse_kl", "jsd", "top3_jsd")]
    options = {"chunk_rows": sizes[0], "tile_columns": sizes[1]}
    found = list(zip(*ranks.run(answers, 4, questions, list(WAYS), **options), strict=True))
    for number, problem in enumerate(questions):
        for way, parts in zip(WAYS, found[number * len(WAYS) :], strict=False):
            assert_shards(list(parts), dense(problem), partial=way == "logits")


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_product_of_several_chunks_changes_nothing(ranks: RankPool, world_size: int) -> None:
    """The order of work on a GPU. With 5 tokens among 24 columns, some ranks hold padding alone."""
    questions = [
        make_problem(valid=valid, divergence=DIVERGENCES[name], temperature=0.6).padded(torch.nan)
        for name in ("reverse_kl", "jsd", "top3_jsd")
        for valid in (21, 5)
    ]
    options = {"chunk_rows": 2, "tile_columns": 24, "group_rows": 5}
    found = list(zip(*ranks.run(answers, world_size, questions, ["grad_in_forward"], **options), strict=True))
    for problem, parts in zip(questions, found, strict=True):
        assert_shards(list(parts), dense(problem), partial=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_same_bits(ranks: RankPool, dtype: torch.dtype) -> None:
    questions = [
        make_problem(
            rows=33, columns=512, valid=500, hidden=32, gated=20, divergence=DIVERGENCES[name], temperature=0.6
        ).to(dtype)
        for name in ("reverse_kl", "forward_kl", "jsd", "top3_jsd")
    ]
    ways = ["terms", "grad_in_forward"]
    found = list(zip(*ranks.run(answers, 4, questions, ways, chunk_rows=8, tile_columns=50), strict=True))
    for number, problem in enumerate(questions):
        expected = dense(problem)
        for first, *others in found[number * 2 : number * 2 + 2]:
            assert_close(first.terms_4T.double(), expected.terms_4T, rtol=2e-5, atol=2e-5)
            for other in others:
                assert torch.equal(other.terms_4T, first.terms_4T)
                assert torch.equal(other.hidden_grad_TH, first.hidden_grad_TH)


def test_unreduced_hidden_gradient_is_this_shards_part(ranks: RankPool) -> None:
    problem = make_problem()
    ways = ["terms", "recompute", "grad_in_forward"]
    found = list(zip(*ranks.run(answers, 2, [problem], ways, reduce_hidden_grad=False), strict=True))
    for parts in found:
        assert_shards(list(parts), dense(problem), partial=True)
        assert not torch.allclose(parts[0].hidden_grad_TH, dense(problem).hidden_grad_TH)


@pytest.mark.parametrize("gated", [0, 1])
def test_few_or_no_rows_on_several_ranks(ranks: RankPool, gated: int) -> None:
    """No row needs no collective, and one row as many as any other: nobody waits for somebody else."""
    questions = [make_problem(rows=gated, gated=gated, divergence=d) for d in DIVERGENCES.values()]
    found = list(zip(*ranks.run(answers, 2, questions, list(WAYS)), strict=True))
    for number, problem in enumerate(questions):
        for way, parts in zip(WAYS, found[number * len(WAYS) :], strict=False):
            assert_shards(list(parts), dense(problem), partial=way == "logits")
            assert gated or all(part.weight_grad_VH.eq(0).all() for part in parts)


def logprobs(problem: Problem) -> tuple[Tensor, Tensor]:
    """Alone, and as one of all terms."""
    weight_VH, vocab = shard_of(problem)
    alone_T = head_logprobs(problem.hidden_TH, weight_VH, problem.labels_T, vocab=vocab, options=options_of(problem))
    terms, _ = ask("terms", replace(problem, weight_VH=weight_VH), vocab=vocab)
    return alone_T, terms.logprob_T


def test_logprobs_alone_are_the_same_bits(ranks: RankPool) -> None:
    problem = make_problem(temperature=0.6, gated=0)
    for alone_T, together_T in ranks.run(logprobs, 4, problem):
        assert torch.equal(alone_T, together_T)
        assert_close(alone_T, dense(problem).terms_4T[0], **EXACT)


# --- errors


def error_message(problem: Problem, way: str) -> str:
    weight_VH, vocab = shard_of(problem)
    with pytest.raises(NumericsError) as caught:
        package(way, problem, vocab=vocab, weight_VH=weight_VH)
    return str(caught.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", ["label", "weight"])
def test_every_rank_raises_alike(ranks: RankPool, way: str, fault: str) -> None:
    """Also where one rank alone holds what is broken."""
    problem = make_problem()
    if fault == "label":
        problem.labels_T[9] = problem.valid
    else:
        problem.hidden_TH[:9, 0] = 0
        problem.teacher_GH[:, 0] = 0
        problem.weight_VH[3] = 0
        problem.weight_VH[3, 0] = 1e308
        problem.hidden_TH[9, 0] = 1e308
    first, second = ranks.run(error_message, 2, problem, way)
    assert first == second
    assert "token row 9 of 11" in first


# --- one matrix for input and output


def tied_gradient(problem: Problem, tokens_T: Tensor, way: str) -> Tensor:
    """Gradient of this rank's shard where the same tensor embeds the input of both students and teachers."""
    weight_VH, vocab = shard_of(problem)
    weight_VH.requires_grad_()
    embedded_VH = _WholeTable.apply(weight_VH)
    tied = replace(
        problem,
        weight_VH=weight_VH,
        hidden_TH=embedded_VH[tokens_T].tanh(),
        teacher_GH=embedded_VH[tokens_T[problem.rows_G]].sin(),
    )
    _, loss = ask(way, tied, vocab=vocab)
    (weight_grad_VH,) = torch.autograd.grad(loss, weight_VH)
    return weight_grad_VH


class _WholeTable(torch.autograd.Function):
    """All shards' rows, for an embedding. Every rank computes the same from it, so its gradient is cut, not summed."""

    @staticmethod
    def forward(ctx: object, weight_VH: Tensor) -> Tensor:
        parts = [torch.empty_like(weight_VH) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, weight_VH.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, grad_VH: Tensor) -> Tensor:
        return grad_VH.chunk(dist.get_world_size())[dist.get_rank()]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("way", ["terms", "recompute", "grad_in_forward"])
def test_tied_matrix_gets_nothing_from_the_teacher(ranks: RankPool, world_size: int, way: str) -> None:
    problem = make_problem(temperature=0.6, teacher_temperature=1.5)
    tokens_T = torch.randint(0, problem.valid, (11,), generator=torch.Generator().manual_seed(3))
    found_VH = torch.cat(ranks.run(tied_gradient, world_size, problem, tokens_T, way))

    weight_VH = problem.weight_VH.clone().requires_grad_()
    exact = replace(problem, weight_VH=weight_VH, teacher_GH=weight_VH.detach()[tokens_T[problem.rows_G]].sin())
    logits_TV = weight_VH[tokens_T].tanh() @ weight_VH[: problem.valid].T
    assert_close(found_VH, dense_of_logits(exact, logits_TV, (weight_VH, weight_VH)).weight_grad_VH, **EXACT)


# --- sequence parallelism: each rank holds a part of the positions


def through_sequence_parallel(problem: Problem, rows_T: Tensor, ways: list[str]) -> list[tuple[Tensor, Tensor]]:
    """As the forward step does it: gradients of this rank's positions [S / TP, B = 1, H] and of its shard."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from sdpg_megatron.config import ParallelConfig
    from sdpg_megatron.mcore import parallel

    parallel.initialize(ParallelConfig(tensor=dist.get_world_size(), sequence=True), 0)
    weight_VH, vocab = shard_of(problem)
    weight_VH.requires_grad_()
    whole_SH = torch.zeros(16, problem.hidden_TH.shape[1], dtype=torch.float64)
    whole_SH[rows_T] = problem.hidden_TH
    part_SBH = whole_SH.chunk(dist.get_world_size())[dist.get_rank()][:, None].clone().requires_grad_()
    found = []
    for way in ways:
        hidden_SBH = gather_from_sequence_parallel_region(part_SBH, tensor_parallel_output_grad=True)
        rows_TH = hidden_SBH.transpose(0, 1).flatten(0, 1).index_select(0, rows_T)
        gathered = replace(problem, hidden_TH=rows_TH, weight_VH=weight_VH)
        _, loss = ask(way, gathered, vocab=vocab, reduce_hidden_grad=False)
        found.append(torch.autograd.grad(loss, (part_SBH, weight_VH)))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_under_sequence_parallelism_the_gradient_is_summed_once(ranks: RankPool, world_size: int) -> None:
    """By the reduce-scatter behind the gather: each rank gets the whole gradient of its own positions."""
    problem = make_problem(temperature=0.6)
    rows_T = torch.tensor([1, 2, 3, 5, 7, 8, 9, 10, 12, 13, 15])
    expected = dense(problem)
    for parts in zip(*ranks.run(through_sequence_parallel, world_size, problem, rows_T, list(WAYS)), strict=True):
        whole_SH = torch.cat([part_SBH for part_SBH, _ in parts])[:, 0]
        assert_close(whole_SH[rows_T], expected.hidden_grad_TH, **EXACT)
        assert whole_SH[[0, 4, 6, 11, 14]].eq(0).all()
        assert_close(torch.cat([part_VH for _, part_VH in parts]), expected.weight_grad_VH, **EXACT)


# --- options that ranks have to agree on


def fitted_rows(given: int | None = None) -> tuple[int | None, int | None]:
    """(rows where one rank has little memory free, where all have much)."""
    vocab = VocabShard(dist.get_rank() << 16, 1 << 17, dist.group.WORLD)
    weight_VH = torch.empty(1 << 16, 1)
    little, much = 256 << 20, 1 << 40
    options = HeadOptions(chunk_rows=given)
    uneven = options.fitted(weight_VH, vocab, free_bytes=little if dist.get_rank() else much)
    return uneven.chunk_rows, options.fitted(weight_VH, vocab, free_bytes=much).chunk_rows


def test_the_rank_with_the_least_memory_decides(ranks: RankPool) -> None:
    alone = HeadOptions().fitted(torch.empty(1 << 16, 1), VocabShard(0, 1 << 17, None), free_bytes=256 << 20)
    first, second = ranks.run(fitted_rows, 2)
    assert first == second
    assert first[0] == alone.chunk_rows and first[0] < first[1]
    assert ranks.run(fitted_rows, 2, 7) == [(7, 7), (7, 7)]


# --- few tokens that the student can produce


def few_tokens(student_TV: Tensor, teacher_TV: Tensor, over: Any) -> tuple[Tensor, Tensor]:
    """Divergences, and their gradient in this rank's columns."""
    columns = student_TV.shape[1] // dist.get_world_size()
    start = dist.get_rank() * columns
    leaf_TV = student_TV[:, start : start + columns].clone().requires_grad_()
    terms = logits_terms(
        leaf_TV,
        student_TV.argmax(1),
        vocab=VocabShard(start, student_TV.shape[1], dist.group.WORLD),
        teacher_GV=teacher_TV[:, start : start + columns],
        options=HeadOptions(divergence=TopK(3, over)),
    )
    assert terms.divergence_T is not None
    (gradient_TV,) = torch.autograd.grad(terms.divergence_T.sum(), leaf_TV)
    return terms.divergence_T.detach(), gradient_TV


@pytest.mark.parametrize("name", ["top3_reverse_kl", "top3_jsd"])
def test_fewer_possible_tokens_than_top_ones(ranks: RankPool, name: str) -> None:
    """Two of four tokens are possible, on two ranks whose shards are too small for the top 3.

    Which impossible token is the third among the top ones is of no account, but for the floor of 1e-7 under the tail.
    """
    pairs = [(0, 3), (0, 1), (2, 3), (1, 2), (0, 2), (1, 3)]
    student_TV = torch.full((6, 4), -torch.inf, dtype=torch.float64)
    for row, pair in enumerate(pairs):
        student_TV[row, list(pair)] = torch.tensor([1.0, 0.5], dtype=torch.float64)
    teacher_TV = torch.tensor([-3.0, -2.0, -2.5, -4.0], dtype=torch.float64).expand(6, 4)
    divergence = DIVERGENCES[name]
    assert isinstance(divergence, TopK)
    ((alone_T, gradient_TV),) = ranks.run(few_tokens, 1, student_TV, teacher_TV, divergence.over)
    parts = ranks.run(few_tokens, 2, student_TV, teacher_TV, divergence.over)
    for found_T, _ in parts:
        assert_close(found_T, alone_T, rtol=0, atol=1e-6)
    assert_close(torch.cat([part_TV for _, part_TV in parts], 1), gradient_TV, rtol=0, atol=1e-6)
