"""Rows of JSONL and Parquet files, one at a time, each with a name for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from sdpg_megatron.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file has it."""

    where: str
    """``file:line`` in JSONL, ``file: row N`` in Parquet."""
    number: int
    """Line or row, from 1."""
    values: Mapping[str, object]


def read_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a ``.jsonl`` or ``.parquet`` file; blank JSONL lines are passed over.

    Raises:
        DataError: unknown file type, unreadable file, or a line that is not a JSON object.
    """
    match path.suffix:
        case ".jsonl":
            return _read_jsonl(path)
        case ".parquet":
            return _read_parquet(path)
    raise DataError(str(path), f"suffix {path.suffix!r}", ".jsonl or .parquet", "convert or rename the file")


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        # Bytes, so that a line that is not UTF-8 is reported with its number.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_line(f"{path}:{number}", number, line)
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse_line(where: str, number: int, line: bytes) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"invalid JSON ({error})", "one JSON object per line", "correct the line") from error
    if not isinstance(values, dict):
        raise DataError(where, f"a JSON {type(values).__name__}", "a JSON object", "write {column: value, ...}")
    return Row(where, number, values)


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", number, values)
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(str(path), str(error), "a readable file", "check the path and the file")
