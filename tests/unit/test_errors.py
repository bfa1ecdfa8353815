"""Errors travel between ranks."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from sdpg_megatron import errors
from sdpg_megatron.errors import (
    ConfigError,
    ConversionError,
    DataError,
    EvaluationError,
    FilterError,
    LaunchError,
    MismatchError,
    NonFiniteLossError,
    NonFiniteWeightsError,
    OutputError,
    RolloutError,
    SdpgError,
    ServerError,
    SkippedStepsError,
    VerifierError,
    WriteError,
    fix_of,
)
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rollout.base import WeightsWanted

EXAMPLES: list[SdpgError] = [
    ConfigError("model.path", "here", "a folder", "make one"),
    ConversionError("a: vocab_size", "3", "4, as in config.json", "use another"),
    DataError("a.jsonl:3", "nothing", "a row", "write one"),
    EvaluationError("eval/summary.json", "nothing", "a summary", "evaluate first"),
    FilterError("filters:easy", "train.jsonl:4", "None"),
    MismatchError(3, 0.5, 0.05),
    NonFiniteWeightsError("after optimizer step 3", "model.norm.weight"),
    OutputError("standard output", "Broken pipe", reader_ended=True),
    LaunchError("MASTER_PORT", "29500, in use", "a free port", "choose another"),
    NonFiniteLossError(7, 3),
    SkippedStepsError(7, 3),
    ServerError("http://127.0.0.1:1", "/health", "no answer", retryable=True),
    VerifierError("step 1", 4, 4, "on a:1: ValueError: no", 0.5),
    RolloutError("no server is left"),
    WriteError("run/metrics.jsonl", "No space left on device", 0, "free space"),
    ConfigError.joined([ConfigError("a", 1, "2", "set it"), ConfigError("b", 1, "2", "set it")]),
    WeightsWanted("none", {2: Group(Prompt("a:1", (1,), (2,), "3"), ())}),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_a_journey(error: SdpgError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)


def test_every_error_with_a_constructor_of_its_own_is_among_the_examples() -> None:
    own = {kind for kind in vars(errors).values() if isinstance(kind, type) and "__init__" in vars(kind)}
    assert own <= {type(error) for error in EXAMPLES}


def test_errors_are_joined_a_line_each() -> None:
    one, other = ConfigError("a", 1, "2", "set it"), ConfigError("b.c", None, "3", "add it")
    assert ConfigError.joined([one]) is one
    joined = ConfigError.joined([one, other])
    assert str(joined).splitlines() == ["2 errors", f"  {one}", f"  {other}"]
    assert joined.field == "a"


def obstacle(act: Callable[[Path], object], path: Path, *, reading: bool = False) -> str:
    """The fix for what the system says."""
    try:
        act(path)
    except OSError as error:
        return fix_of(error, path, reading=reading)
    raise AssertionError("nothing was refused")


def make(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def write(path: Path) -> None:
    path.write_text("")


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    """A file where a folder has to be, at the end of a path or within it; a broken link; a folder instead of a file."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good").symlink_to(tmp_path)
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "good" / "file" / "a" / "b"):
        file = path if path.name == "file" else next(part for part in path.parents if part.name == "file")
        assert obstacle(make, path) == f"remove or rename the file {file}, or choose another path"
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        assert obstacle(make, path).startswith(f"remove or rename the broken link {tmp_path / 'link'}, or")
    assert obstacle(write, tmp_path) == f"remove or rename the folder {tmp_path}"
    assert obstacle(Path.read_bytes, tmp_path, reading=True) == f"name a file in the folder {tmp_path}"
    assert obstacle(Path.read_bytes, tmp_path / "a" / "b", reading=True).endswith(f"there is no a in {tmp_path}")
    assert obstacle(Path.touch, tmp_path / "a" / "b") == f"create the folder {tmp_path / 'a'}"
    assert obstacle(make, tmp_path / ("x" * 300)) == "choose a shorter path"


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EACCES, "get the right to write to"),
        (errno.EROFS, "choose a path on a file system that is not read-only"),
        (errno.ENOSPC, "free space on the disk"),
        (errno.EIO, "check the disk and its mount"),
    ],
)
def test_so_is_what_a_disk_refuses(tmp_path: Path, number: int, fix: str) -> None:
    assert fix_of(OSError(number, os.strerror(number)), tmp_path / "a" / "b").startswith(fix)


def test_the_right_that_is_lacking_is_that_to_the_innermost_folder_there_is(tmp_path: Path) -> None:
    found = fix_of(OSError(errno.EACCES, ""), tmp_path / "a" / "b")
    assert found == f"get the right to write to {tmp_path}, or choose another path"
