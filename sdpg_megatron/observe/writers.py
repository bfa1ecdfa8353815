"""Metrics writers: JSON lines, TensorBoard events, or several at once."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.external import load_object
from sdpg_megatron.errors import ConfigError, DataError
from sdpg_megatron.observe.files import Appender, json_line, writing
from sdpg_megatron.observe.rollout_log import FOLDER as ROLLOUT_FOLDER
from sdpg_megatron.observe.truncate import beyond, truncate_events, truncate_files, truncate_lines

METRICS_FILE = "metrics.jsonl"
PROMPTS_FILE = "prompts.jsonl"
"""Prompts of each step's batch, in order: ``{"step": ..., "prompts": [uid, ...]}`` lines."""
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter(Protocol):
    """Destination of a run's metrics, on the main rank. Constructor and `write` raise `WriteError` if the disk refuses.

    A class of your own, named in `writers`, is built as ``Class(config)`` with the `RunConfig`.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` after `step` training steps (0: before the first), durably."""
        ...

    def close(self) -> None:
        """Release the destination. No writes may follow."""
        ...


class JsonlWriter:
    """Appends ``{"step": ..., name: value}`` lines, with null for non-finite values."""

    def __init__(self, path: Path) -> None:
        self._file = Appender(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.append(step, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def append(self, step: int, fields: Mapping[str, Any]) -> None:
        """Append a record of JSON values, durably."""
        self._file.append(json_line({"step": step, **fields}))

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Writes scalars as TensorBoard events.

    TensorBoard's own writer runs on a thread, where errors of a full disk cannot be caught.
    """

    def __init__(self, folder: Path) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        now = time.time()  # with microseconds: each call of a run has its own file, and readers sort by name
        self._file = Appender(folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}")
        self._append([{"file_version": "brain.Event:2"}])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = ({"tag": name, "simple_value": value} for name, value in values.items())
        self._append([{"step": step, "summary": {"value": [scalar]}} for scalar in scalars])

    def _append(self, events: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import, and only the writing rank needs it
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        for event in events:
            RecordWriter(records).write(Event(wall_time=time.time(), **event).SerializeToString())
        self._file.append(records.getvalue())

    def close(self) -> None:
        self._file.close()


class MultiWriter:
    """Writes to several destinations, or to none on ranks that do not report."""

    def __init__(self, writers: Sequence[MetricsWriter]) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        """Close all, even if closing one fails."""
        with ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)


def open_writers(run_dir: Path, external: Sequence[MetricsWriter] = ()) -> MetricsWriter:
    """Open the run's metrics.jsonl and TensorBoard events for appending; `external` writers are written to as well."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    own: list[MetricsWriter] = [JsonlWriter(run_dir / METRICS_FILE), TensorBoardWriter(run_dir / TENSORBOARD_FOLDER)]
    return MultiWriter([*own, *external])


def find_writer(spec: str) -> Callable[[RunConfig], MetricsWriter]:
    """The class of `config.writers`. Raises `ConfigError`."""
    found: Callable[[RunConfig], MetricsWriter] = load_object("writers", spec)
    if not (isinstance(found, type) and hasattr(found, "write") and hasattr(found, "close")):
        raise ConfigError("writers", spec, "a class with write(step, values) and close()", "see docs/training.md")
    return found


def open_external(spec: str, config: RunConfig) -> MetricsWriter:
    """Build a writer of `config.writers`. Raises `ConfigError`, also if its constructor raises."""
    kind = find_writer(spec)
    try:
        return kind(config)
    except Exception as error:
        expected = f"a writer that opens ({type(error).__name__}: {error})"
        raise ConfigError("writers", spec, expected, "correct it, or remove it from writers") from error


def truncate_records(run_dir: Path, step: int, *, evaluated: bool) -> None:
    """Truncate all of a run's records to the step from which it continues; see `sdpg_megatron.observe.truncate`."""
    is_beyond = beyond(step, evaluated=evaluated)
    truncate_lines(run_dir / METRICS_FILE, is_beyond)
    truncate_events(run_dir / TENSORBOARD_FOLDER, is_beyond)
    truncate_lines(run_dir / PROMPTS_FILE, beyond(step, evaluated=True))
    truncate_files(run_dir / ROLLOUT_FOLDER, beyond(step, evaluated=True))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the records of a metrics.jsonl, one per step; null becomes NaN.

    Raises:
        DataError: a line is neither a record nor blank.
    """
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return [_record(line, f"{path}:{number}") for number, line in lines if line.strip()]


def last_value(path: Path, name: str) -> float | None:
    """Newest finite value of a metric in a metrics.jsonl; None if there is none. Raises as `read_metrics`."""
    found = (record.get(name, math.nan) for record in reversed(read_metrics(path)))
    return next((value for value in found if math.isfinite(value)), None)


def _record(line: bytes, where: str) -> dict[str, float]:
    try:
        record = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        return {**record, "step": int(record["step"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = repr(line[:40].decode(errors="replace"))
        raise DataError(where, found, 'a record, {"step": ..., name: value}', "remove the line") from error
