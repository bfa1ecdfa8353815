"""Files of a checkpoint: flushed to the disk, summed, and held against their sums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sdpg_megatron.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class FileSum:
    """What a file is known by."""

    bytes: int
    sha256: str
    """As ``sha256sum`` prints it."""


def fsync_and_hash(path: Path) -> FileSum:
    """Have the disk keep a file's content, and sum it up."""
    _flush_file(path)
    return FileSum(path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Have the disk keep the entries of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Have the disk keep a folder with all that is in it."""
    for path in folder.rglob("*"):
        flush_folder(path) if path.is_dir() else _flush_file(path)
    flush_folder(folder)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_durably(path: Path, text: str) -> None:
    """Write aside, flush, then put in place: the file is whole or absent, also after a loss of power."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    flush_folder(path.parent)


def find_damage(
    folder: Path,
    sums: Mapping[str, FileSum],
    *,
    digests: bool,
    threads: int = 1,
    looked: Callable[[int], None] = lambda nbytes: None,
) -> CheckpointError | None:
    """The first file of a folder that is not what `sums` says of it.

    Args:
        sums: by name relative to the folder.
        digests: whether to read the files whole; their sizes are always compared.
        threads: how many files are read at a time.
        looked: told the size of each file that is as it should be.
    """

    def look(name: str) -> CheckpointError | None:
        damage = _look(folder, name, sums[name], digests)
        if damage is None:
            looked(sums[name].bytes)
        return damage

    with ThreadPoolExecutor(threads) as pool:
        found = next(filter(None, pool.map(look, sums)), None)
        pool.shutdown(cancel_futures=True)
        return found


def _look(folder: Path, name: str, expected: FileSum, digests: bool) -> CheckpointError | None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return _damaged(path, f"{size} bytes", f"{expected.bytes}")
        if digests and (found := sha256_of(path)) != expected.sha256:
            return _damaged(path, f"sha256 {found}", expected.sha256)
    except OSError as error:
        return _damaged(path, error.strerror or str(error), f"a file of {expected.bytes} bytes")
    except ValueError as error:  # a name that no file can have
        return CheckpointError(f"{folder}: found {error} in {name!r}, expected the name of a file in the manifest")
    return None


def _damaged(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: found {found}, expected {expected}, as the manifest says")
