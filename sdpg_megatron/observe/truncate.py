"""Truncate a run's records to the step from which it continues; later records will be written again.

Record files are append-only, so each is truncated in place after its last valid record. That also drops a partial
record left by a kill. Failures raise `WriteError`.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from sdpg_megatron.observe.files import writing

Beyond = Callable[[int], bool]
"""True if the record of a step is later than the point from which the run continues."""

_LENGTH, _CHECKSUM = struct.Struct("<Q"), 4


def beyond(step: int, *, evaluated: bool) -> Beyond:
    """Predicate for a run that continues after `step`.

    `evaluated`: the evaluation due after `step` was made. The record of `step` is written only then.
    """
    return lambda other: other > step or (other == step and not evaluated)


def truncate_lines(path: Path, is_beyond: Beyond) -> None:
    """Truncate a file of ``{"step": ..., name: value}`` lines, if it exists.

    An invalid line before a valid record stays, for readers to report; after the last one it is dropped.
    """
    if not path.exists():
        return
    kept = end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            stays = _stays(line, is_beyond)
            if stays:
                kept = end
            elif stays is not None:
                break
    _cut(path, kept)


def _stays(line: bytes, is_beyond: Beyond) -> bool | None:
    """True or False for a record; None for an invalid or incomplete line."""
    try:
        stays = not is_beyond(int(json.loads(line)["step"]))
        return stays if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def truncate_events(folder: Path, is_beyond: Beyond) -> None:
    """Truncate TensorBoard event files. Readers hide superseded events only if they read the files in order."""
    from tensorboard.compat.proto.event_pb2 import Event

    for path in folder.glob("events.*"):
        data, kept = path.read_bytes(), 0
        while kept + _LENGTH.size + _CHECKSUM <= len(data):
            start = kept + _LENGTH.size + _CHECKSUM
            end = start + _LENGTH.unpack_from(data, kept)[0]
            if end + _CHECKSUM > len(data):
                break
            event = Event.FromString(data[start:end])
            if event.HasField("summary") and is_beyond(event.step):
                break
            kept = end + _CHECKSUM
        _cut(path, kept)


def _cut(path: Path, kept: int) -> None:
    with writing(path):
        os.truncate(path, kept)


def truncate_files(folder: Path, is_beyond: Beyond) -> None:
    """Remove files ``step_<number>.jsonl`` of later steps, and partial ones left by a kill."""
    for path in [*_steps_beyond(folder, ".jsonl", is_beyond), *folder.glob(".step_*")]:
        with writing(path):
            path.unlink()


def truncate_folders(folder: Path, step: int, *, evaluated: bool) -> None:
    """Remove evaluations, in folders ``step_<number>``, that will be made again."""
    for path in _steps_beyond(folder, "", beyond(step, evaluated=evaluated)):
        with writing(path):
            shutil.rmtree(path)


def _steps_beyond(folder: Path, suffix: str, is_beyond: Beyond) -> list[Path]:
    numbers = {path: path.name.removeprefix("step_").removesuffix(suffix) for path in folder.glob(f"step_*{suffix}")}
    return [path for path, number in numbers.items() if number.isdigit() and is_beyond(int(number))]
