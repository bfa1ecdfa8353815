"""Files of a checkpoint: fsync, digests, and comparison with the digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sdpg_megatron.errors import CheckpointError
from sdpg_megatron.observe.files import fsync_path


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and digest of a file."""

    bytes: int
    sha256: str
    """Hexadecimal."""


def fsync_and_hash(path: Path) -> FileSum:
    """Flush a file to the disk, and compute its size and digest."""
    fsync_path(path)
    return FileSum(path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_tree(folder: Path) -> None:
    """Flush a folder and all its contents to the disk."""
    for path in folder.rglob("*"):
        fsync_path(path)
    fsync_path(folder)


def find_damage(
    folder: Path,
    sums: Mapping[str, FileSum],
    *,
    digests: bool,
    threads: int = 1,
    checked: Callable[[int], None] = lambda nbytes: None,
) -> CheckpointError | None:
    """First file of a folder that differs from its recorded size or digest; None if all agree.

    Args:
        sums: expected size and digest by path relative to the folder.
        digests: read the files and compare digests; sizes are always compared.
        threads: number of files read at a time.
        checked: called with the size of each file that agrees.
    """

    def check(name: str) -> CheckpointError | None:
        damage = _check(folder, name, sums[name], digests)
        if damage is None:
            checked(sums[name].bytes)
        return damage

    with ThreadPoolExecutor(threads) as pool:
        found = next(filter(None, pool.map(check, sums)), None)
        pool.shutdown(cancel_futures=True)
        return found


def _check(folder: Path, name: str, expected: FileSum, digests: bool) -> CheckpointError | None:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return _damaged(path, f"{size} bytes", f"{expected.bytes}")
        if digests and (found := sha256_of(path)) != expected.sha256:
            return _damaged(path, f"sha256 {found}", expected.sha256)
    except OSError as error:
        return _damaged(path, error.strerror or str(error), f"a file of {expected.bytes} bytes")
    except ValueError as error:  # not a possible file name
        return CheckpointError(f"{folder}: found {error} in {name!r}, expected the name of a file in the manifest")
    return None


def _damaged(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: found {found}, expected {expected}, as the manifest says")
