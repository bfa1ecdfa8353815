"""Read rows of JSONL, JSON, CSV and Parquet files, with their location for error messages.

Text files are UTF-8 in any locale, with or without byte order mark, with any line endings, optionally gzipped.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
import pyarrow.parquet

from sdpg_megatron.answers import WrittenFloat
from sdpg_megatron.errors import DataError, fix_of, reason_of

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
"""Supported suffixes. All but Parquet may also end in ``.gz``."""
EXPECTED_SUFFIX = f"{', '.join(FORMATS)}, or one of the first three with .gz"
MAX_FIELD = 1 << 28
"""Maximum length of a CSV field in characters; Python's default is 131,072."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_BLANK = re.compile(r"\S")
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder(parse_float=WrittenFloat)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. JSON decimals are `WrittenFloat`, CSV values are text."""

    where: str
    """``file:line``, or ``file: row N`` for Parquet."""
    number: int
    """Line number, or row number from 1 for Parquet and JSON arrays."""
    values: Mapping[str, object]


def find_files(patterns: Sequence[Path]) -> list[Path]:
    """Expand glob patterns such as ``data/*.parquet``, each to its files in sorted order.

    Raises:
        DataError: no file matches a pattern.
    """
    found: list[Path] = []
    for pattern in patterns:
        if not re.search(r"[*?\[]", str(pattern)) or pattern.exists():
            found.append(pattern)
            continue
        matches = sorted(map(Path, glob(str(pattern), recursive=True)))
        if not matches:
            raise DataError(str(pattern), "no file that matches", "at least one", "correct the pattern")
        found += matches
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """Stream the rows of a file in one of `FORMATS`. Blank lines are skipped.

    A ``.json`` file is an array of objects, or has one object per line like ``.jsonl``. The first line of a ``.csv``
    file has the column names; an empty field is None.

    Raises:
        DataError: unknown file type, unreadable file, text that is not UTF-8, or a row that cannot be parsed.
    """
    match file_format(path):
        case ".jsonl":
            return _read_jsonl(path)
        case ".json":
            return _read_json(path)
        case ".csv":
            return _read_csv(path)
        case ".parquet":
            return _read_parquet(path)
    if path.is_dir():
        raise DataError(str(path), "a folder", "a file", f"name its files, for example {path}/*.jsonl")
    raise DataError(str(path), f"suffix {path.suffix!r}", EXPECTED_SUFFIX, "convert or rename the file")


def file_format(path: Path) -> str | None:
    """Format in `FORMATS` by the suffix of a path; None for another suffix."""
    suffix = path.suffix
    if suffix == ".gz":
        suffix = Path(path.stem).suffix
        return suffix if suffix in FORMATS and suffix != ".parquet" else None
    return suffix if suffix in FORMATS else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers, from 1, and decoded lines."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8")
                except UnicodeDecodeError as error:
                    found = f"bytes that are not UTF-8 ({error.reason} at byte {error.start} of the line)"
                    raise DataError(f"{path}:{number}", found, "text in UTF-8", "convert the file to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _read_jsonl(path: Path, expected: str = "one JSON object per line") -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                values = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise DataError(where, f"invalid JSON ({error})", expected, "correct the line") from error
            yield _json_row(where, number, values, line)


def _read_json(path: Path) -> Iterator[Row]:
    start = next((line.lstrip()[0] for _, line in _lines(path) if line.strip()), "")
    if start == "[":
        return _read_array(path)
    return _read_jsonl(path, "an array of objects, or one JSON object per line")


def _read_array(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path))
    position = _skip_blanks(text, text.index("[") + 1)
    line, number = 1 + text.count("\n", 0, position), 0
    while text[position : position + 1] != "]":
        where, number = f"{path}:{line}", number + 1
        try:
            values, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _broken_array(where, f"invalid JSON ({error})", "an array of objects") from error
        yield _json_row(where, number, values, text[position:end])
        following = _skip_blanks(text, end)
        line += text.count("\n", position, following)
        if (found := text[following : following + 1]) == ",":
            position = _skip_blanks(text, following + 1)
            line += text.count("\n", following, position)
        elif found == "]":
            position = following
        else:
            raise _broken_array(f"{path}:{line}", f"{found!r} after an object", "a comma, or the end of the array")
    if rest := text[position + 1 :].strip():
        raise _broken_array(f"{path}:{line}", f"{rest[:20]!r} after the array", "the end of the file")


def _skip_blanks(text: str, start: int) -> int:
    """Position of the first character at or after `start` that is not whitespace."""
    found = _NOT_BLANK.search(text, start)
    return found.start() if found else len(text)


def _broken_array(where: str, found: str, expected: str) -> DataError:
    return DataError(where, found, expected, "correct the file, or write one JSON object per line")


def _json_row(where: str, number: int, values: object, text: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(where, f"a JSON {type(values).__name__}", "a JSON object", "write {column: value, ...}")
    if _ESCAPED_SURROGATE.search(text):
        _refuse_surrogates(where, values)
    return Row(where, number, values)


def _refuse_surrogates(where: str, values: Mapping[str, object]) -> None:
    """Raise if a JSON escape left half of a surrogate pair, which neither UTF-8 nor tokenizers can represent."""
    for column, value in values.items():
        if _SURROGATE.search(json.dumps([column, value], ensure_ascii=False)):
            found = f"a lone surrogate (half of a character beyond U+FFFF) in column {column!r}"
            raise DataError(where, found.encode(errors="backslashreplace").decode(), "text", "remove or replace it")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    columns: list[str] | None = None
    while True:
        number = reader.line_num + 1
        where = f"{path}:{number}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(where, f"invalid CSV ({error})", "fields as in RFC 4180", "correct it") from error
        if fields is None:
            return
        if not fields:
            continue
        if columns is None:
            columns = fields
            if len(set(columns)) < len(columns) or not all(name.strip() for name in columns):
                raise DataError(where, f"the columns {columns}", "a different name for each", "correct the first line")
            continue
        if len(fields) != len(columns):
            expected = f"{len(columns)}, as the first line has"
            raise DataError(where, f"{len(fields)} fields", expected, "quote fields that have commas or line ends")
        yield Row(where, number, {name: field or None for name, field in zip(columns, fields, strict=True)})


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fixes = {field.name: fix for field in file.schema_arrow if (fix := _shorten_floats(field.type))}
            for batch in file.iter_batches(batch_size=1024):
                for values in _values(batch, path, number):
                    number += 1
                    for name, fix in fixes.items():
                        values[name] = fix(values[name])
                    yield Row(f"{path}: row {number}", number, values)
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def _values(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    """Rows of a record batch. If text is not UTF-8, search row by row for the error message."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        for index in range(len(batch)):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                where = f"{path}: row {before + index + 1}"
                raise DataError(where, f"text that is not UTF-8 ({error})", "text", "remove or replace it") from error
        raise


def _shorten_floats(kind: Any) -> Callable[[Any], Any] | None:
    """Function that converts float32 and float16 numbers in a value of Arrow type `kind` to Python floats with the
    shortest decimal text, 7.3 instead of 7.300000190734863; None if the type contains no such numbers."""
    types = pyarrow.types
    if types.is_float32(kind) or types.is_float16(kind):
        width = np.float32 if types.is_float32(kind) else np.float16
        return lambda value: None if value is None else float(str(width(value)))
    if types.is_struct(kind):
        fixes = {field.name: fix for field in kind if (fix := _shorten_floats(field.type))}
        return (lambda value: value and {**value, **{k: fix(value[k]) for k, fix in fixes.items()}}) if fixes else None
    if types.is_map(kind):
        return _each(_shorten_floats(kind.item_type), lambda fix, item: (item[0], fix(item[1])))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _each(_shorten_floats(kind.value_type), lambda fix, item: fix(item))
    return _shorten_floats(kind.value_type) if types.is_dictionary(kind) else None


def _each(fix: Callable[[Any], Any] | None, apply: Callable[[Any, Any], Any]) -> Callable[[Any], Any] | None:
    return fix and (lambda value: None if value is None else [apply(fix, item) for item in value])


def _unreadable(path: Path, error: Exception) -> DataError:
    system = (
        isinstance(error, OSError) and error.errno is not None
    )  # errors without errno are from gzip and Arrow, for damaged files
    fix = fix_of(cast(OSError, error), path, reading=True) if system else "copy or write the file again"
    return DataError(str(path), reason_of(error), "a readable file", fix)
