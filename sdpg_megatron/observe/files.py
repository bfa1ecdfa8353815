"""Files of a run, beside its checkpoints: whole or absent, or growing by whole pieces; a disk that refuses is named."""

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
    """Where what is done here to `path` fails because of the disk, say so.

    Raises:
        WriteError: in the place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(str(path), error.strerror or str(error), free_mib(path), fix_of(error, path)) from error


def free_mib(path: Path) -> int:
    """Room on the disk of a path, which need not be there; 0 where the disk does not say."""
    for place in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free >> 20
    return 0


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write aside, then put in place; returns `path`.

    Raises:
        WriteError: the disk refused; nothing has changed.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
            aside.replace(path)
        except OSError:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
    return path


def json_line(fields: Mapping[str, Any]) -> bytes:
    r"""One line of JSON in UTF-8, with readable characters.

    A lone surrogate, which UTF-8 has none for, is written as JSON's escape ``\ud83d`` and read back as it was.
    """
    return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class Appender:
    """A file that grows by whole pieces, from its end on."""

    def __init__(self, path: Path) -> None:
        """Raises `WriteError` where the disk refuses."""
        self._path = path
        with writing(path):
            # Nothing is held back: what could not be written would be tried again, and fail again, when it is closed.
            self._file = path.open("ab", buffering=0)

    def append(self, piece: bytes) -> None:
        """Add a piece; the disk has it when the call returns.

        Raises:
            WriteError: the disk refused; what was written of the piece is taken back as far as that works.
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
        """Nothing is added afterwards."""
        self._file.close()
