"""A run's records, cut to where it continues: what comes after will be written again.

Files of records only ever grow, so each is cut in place after the last record that is not beyond, with the half written
one that a kill may leave. Where the disk refuses that, it is a `WriteError`.
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
"""Whether the record of a step is of a time after the run's."""

_LENGTH, _CHECKSUM = struct.Struct("<Q"), 4


def beyond(step: int, *, evaluated: bool) -> Beyond:
    """Of a run that continues after `step`; `evaluated`: with the evaluation that was due after it, before which the
    step has no record."""
    return lambda other: other > step or (other == step and not evaluated)


def truncate_lines(path: Path, is_beyond: Beyond) -> None:
    """Cut a file of ``{"step": ..., name: value}`` lines. No file is no work.

    A line that is no record goes with what is cut; between records that stay it stays, for whoever reads them to name.
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
    """None for what is no record, or not a whole line."""
    try:
        stays = not is_beyond(int(json.loads(line)["step"]))
        return stays if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def truncate_events(folder: Path, is_beyond: Beyond) -> None:
    """Cut TensorBoard's event files. Readers hide such events only if they meet the files in the order of writing."""
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
    """Remove files ``step_<number>.jsonl`` that the run will write again, and what a kill left of one."""
    for path in folder.glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and is_beyond(int(number)):
            with writing(path):
                path.unlink()
    for path in folder.glob(".step_*"):
        with writing(path):
            path.unlink()


def truncate_folders(folder: Path, step: int, *, evaluated: bool) -> None:
    """Remove evaluations, in folders ``step_<number>``, that the run will make again."""
    for path in folder.glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit() and (int(number) > step or (int(number) == step and not evaluated)):
            with writing(path):
                shutil.rmtree(path)
