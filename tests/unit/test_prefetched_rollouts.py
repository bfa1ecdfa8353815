"""The file of responses that were generated ahead."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdpg_megatron.checkpoint.files import FileSum
from sdpg_megatron.checkpoint.prefetched_rollouts import (
    PREFETCHED,
    PrefetchedRollouts,
    read_prefetched,
    write_prefetched,
)
from sdpg_megatron.checkpoint.state import RunState
from sdpg_megatron.config.load import load_config
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.errors import CheckpointError
from sdpg_megatron.records import Group, Prompt, ScoredGroup
from sdpg_megatron.train.start import Start
from sdpg_megatron.train.state import TrainState
from tests.completions import make_completion
from tests.disk import files_end_at
from tests.e2e.runs import ROOT


class Source:
    size = 9

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(f"train.jsonl:{index}", (1, index), (2, index), str(index))

    def describe(self) -> str:
        return "nine"


def responses(index: int, routed: bool) -> ScoredGroup:
    experts = np.arange(12, dtype=np.uint8).reshape(3, 2, 2) + index if routed else None
    completions = (
        make_completion((5, 6, index), (-0.1, -1 / 3, -1e-30), "stop", 4, 'five, "six"\nΩ', experts),
        make_completion((7,), (-2.5,), "length", 5, "", None),
    )
    rewards = (1.0, 1 / 7)
    group = Group(Source()[index], completions)
    errors = (None, "KeyError: 'é' (a.py:3)") if index == 8 else ()
    return ScoredGroup(group, rewards, (), failures=index, errors=errors)


@pytest.mark.parametrize("routed", [False, True])
def test_what_is_written_is_read(tmp_path: Path, routed: bool) -> None:
    prefetched = PrefetchedRollouts((8, 2, 8), tuple(responses(index, routed) for index in (8, 2, 8)))
    write_prefetched(tmp_path / "prefetched", prefetched)
    read = read_prefetched(tmp_path / "prefetched", Source())
    assert read == prefetched
    for old, new in zip(prefetched.groups, read.groups, strict=True):
        for before, after in zip(old.group.completions, new.group.completions, strict=True):
            if before.experts is None:
                assert after.experts is None
            else:
                np.testing.assert_array_equal(before.experts, after.experts, strict=True)


def test_files_with_wider_numbers_are_read(tmp_path: Path) -> None:
    """Earlier versions wrote int64 tokens and float64 log-probs."""
    prefetched = PrefetchedRollouts((8,), (responses(8, False),))
    write_prefetched(tmp_path / "prefetched", prefetched)
    arrays = load_file(tmp_path / "prefetched")
    arrays |= {"tokens": arrays["tokens"].astype(np.int64), "logprobs": arrays["logprobs"].astype(np.float64)}
    save_file(arrays, tmp_path / "wide")
    assert read_prefetched(tmp_path / "wide", Source()) == prefetched


def test_prompts_alone_are_read_too(tmp_path: Path) -> None:
    """Those whose responses are to be generated again."""
    write_prefetched(tmp_path / "prefetched", PrefetchedRollouts((8, 2, 8), ()))
    assert read_prefetched(tmp_path / "prefetched", Source()) == PrefetchedRollouts((8, 2, 8), ())


def test_a_disk_that_refuses_says_so(tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""
    with pytest.raises(OSError, match=r"prefetched: .*File too large"), files_end_at(100):
        write_prefetched(tmp_path / "prefetched", PrefetchedRollouts((8,), (responses(8, False),)))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """Or read as something else of the same form, where the checkpoint's digests were not looked at."""
    path = tmp_path / "prefetched"
    write_prefetched(path, PrefetchedRollouts((8, 2), tuple(responses(index, True) for index in (8, 2))))
    whole, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            read_prefetched(path, Source())
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: found ")
            refused += 1
    assert refused > 150
    path.unlink()
    with pytest.raises(CheckpointError, match="expected responses that a run has generated ahead"):
        read_prefetched(path, Source())


@pytest.mark.parametrize(
    ("failures", "limit", "kept"), [(2, "0.5", False), (1, "0.25", False), (1, "0.5", True), (2, "null", True)]
)
def test_rewards_of_a_verifier_that_failed_are_not_gone_on_with(
    tmp_path: Path, failures: int, limit: str, kept: bool
) -> None:
    """The run has ended for them, and goes on when the verifier is corrected."""
    scored = replace(responses(3, False), failures=failures, errors=())
    write_prefetched(tmp_path / PREFETCHED, PrefetchedRollouts((3,), (scored,)))
    overrides = ["model.path=m", f"reward.failure_limit={limit}"]
    config = load_config(ROOT / "examples" / "smollm2" / "addition.yaml", overrides)
    state = RunState(
        step=1, cursor=Cursor(9, 0, shuffle=True).state(), seconds=0, baseline={}, evaluated=True, config={},
        model="m", data="d", files={PREFETCHED: FileSum(0, "")},
    )  # fmt: skip
    prefetched = TrainState.of(Start(tmp_path, state), config, Source()).prefetched
    assert prefetched == PrefetchedRollouts((3,), (scored,) if kept else ())
