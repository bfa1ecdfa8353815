"""Prompts are read once on each machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.pool import RankPool

pytestmark = pytest.mark.dist


def share(files: list[Path], local_ranks: list[int], machines: list[str], scratch: Path, unreadable: int = -1) -> Any:
    """Read `files[rank]` as the `local_ranks[rank]`-th rank of a machine; how often this rank read, and what it got."""
    from sdpg_megatron.config import DataConfig, ParallelConfig
    from sdpg_megatron.data.dataset import PromptDataset
    from sdpg_megatron.data.source import load_prompts
    from sdpg_megatron.errors import SdpgError
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.train import shared_prompts
    from tests.tiny import tiny_tokenizer

    ranks = parallel.initialize(ParallelConfig(), 0)
    reads = 0

    def load() -> Any:
        nonlocal reads
        reads += 1
        file = files[ranks.rank]
        return load_prompts(DataConfig(train=(file,), eval=(file,)), tiny_tokenizer(), 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(local_ranks[ranks.rank]))
        patch.setattr(shared_prompts, "_machine", lambda: machines[ranks.rank])
        patch.setattr(tempfile, "tempdir", str(scratch))
        patch.delenv("TMPDIR", raising=False)
        if ranks.rank == unreadable:
            patch.setattr(PromptDataset, "open", refuse)
        try:
            train, held_out = shared_prompts.share_prompts(ranks, load)
        except SdpgError as error:
            return reads, str(error)
    assert held_out is not None
    return reads, [prompt.question for prompt in train.prompts], len(held_out), train.digest


def refuse(path: Path) -> Any:
    raise OSError("truncated")


def write(path: Path, *questions: str) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions), encoding="utf-8")
    return path


def test_one_rank_of_each_machine_reads(ranks: RankPool, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    one, other = write(tmp_path / "a.jsonl", "a", "b"), write(tmp_path / "b.jsonl", "c")
    first, second, third, alone = ranks.run(
        share, 4, [one, one, other, other], [0, 1, 0, 1], ["x", "x", "y", "z"], scratch
    )
    assert (first[0], second[0], third[0], alone[0]) == (1, 0, 1, 1)
    assert first[1:] == second[1:] and first[1:3] == (["a", "b"], 2)
    assert third[1:] == alone[1:] and third[1:3] == (["c"], 1)  # the last has nobody to share with, and reads itself
    assert list(scratch.iterdir()) == []


def test_every_rank_raises_what_one_has_found(ranks: RankPool, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.jsonl", "a"), write(tmp_path / "b.jsonl", "a", " ")
    found = ranks.run(share, 3, [good, good, bad], [0, 1, 0], ["x", "x", "y"], tmp_path)
    assert [reads for reads, _ in found] == [1, 0, 1]
    assert {told for _, told in found} == {found[2][1]} and "b.jsonl:2: found empty column 'question'" in found[0][1]
    assert not list(tmp_path.glob("sdpg-prompts-*"))


def test_a_folder_for_temporary_files_that_fails_is_an_error_of_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    good, absent = write(tmp_path / "a.jsonl", "a"), tmp_path / "absent"
    found = ranks.run(share, 2, [good, good], [0, 1], ["x", "x"], absent)
    assert len({told for _, told in found}) == 1 and f"{absent}: could not be written: No such file" in found[1][1]
    found = ranks.run(share, 2, [good, good], [0, 1], ["x", "x"], tmp_path, 1)
    assert len({told for _, told in found}) == 1 and "found truncated, expected the prompts written by" in found[0][1]


def test_a_rank_that_reads_for_itself_fails_for_all(ranks: RankPool, tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.jsonl", "a"), write(tmp_path / "b.jsonl", " ")
    found = ranks.run(share, 2, [good, bad], [0, 1], ["x", "z"], tmp_path)
    assert len({told for _, told in found}) == 1 and "b.jsonl:1: found empty column" in found[0][1]
