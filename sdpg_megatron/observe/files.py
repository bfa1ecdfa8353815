"""Atomic and append-only writes of files, with errors that name the path."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdpg_megatron.errors import WriteError, fix_of


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` about `path` into a `WriteError`.

    Raises:
        WriteError: instead of `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(str(path), error.strerror or str(error), free_mib(path), fix_of(error, path)) from error


def free_mib(path: Path) -> int:
    """Free MiB on the disk of a path, which need not exist; 0 if unknown."""
    for place in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free >> 20
    return 0


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file atomically, and return `path`.

    Raises:
        WriteError: the file could not be written, and is unchanged.
    """
    with writing(path):
        write_atomically(path, content)
    return path


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a staging file and rename it: the file is whole or unchanged.

    Args:
        durable: flush the file and the rename to the disk, so that this holds after a loss of power too.

    Raises:
        OSError: the file could not be written, and is unchanged.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        staging.replace(path)
        if durable:
            fsync_path(path.parent)
    except OSError:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        raise


def fsync_path(path: Path) -> None:
    """Flush a file's content or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_line(fields: Mapping[str, Any]) -> bytes:
    r"""Format one line of JSON in UTF-8 without escapes.

    A lone surrogate, which UTF-8 cannot encode, is written as JSON's escape ``\ud83d`` and read back unchanged.
    """
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class Appender:
    """File to which whole pieces are appended."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises `WriteError`."""
        self._path = path
        with writing(path):
            # Unbuffered: a buffered piece that could not be written would fail again in `close`.
            self._file = path.open("ab", buffering=0)

    def append(self, piece: bytes) -> None:
        """Append a piece, and flush it to the disk.

        Raises:
            WriteError: the piece could not be written; a part that was is truncated if possible.
        """
        start = os.fstat(self._file.fileno()).st_size
        with writing(self._path):
            try:
                rest = memoryview(piece)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    self._file.truncate(start)
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()
