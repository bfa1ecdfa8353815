"""`sdpg-megatron`, but with a disk that refuses the file that $SDPG_TEST_REFUSAL names, as ``name:count``.

The count is how often the run has to turn to the file. Some of what is written then goes through.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdpg_megatron.cli import main

VARIABLE = "SDPG_TEST_REFUSAL"
THROUGH = 10
"""Bytes."""


def refuse(name: str, count: int) -> None:
    from sdpg_megatron.observe import files
    from sdpg_megatron.train import export
    from tests.disk import files_end_at

    inner = files.writing
    turns = 0

    @contextmanager
    def writing(path: Path) -> Iterator[None]:
        nonlocal turns
        turns += path.name == name
        if path.name != name or turns != count:
            with inner(path):
                yield
            return
        size = path.stat().st_size if path.is_file() else 0
        with inner(path), files_end_at(size + THROUGH):
            yield

    files.writing = export.writing = writing


if __name__ == "__main__":
    name, count = os.environ[VARIABLE].split(":")
    refuse(name, int(count))
    sys.exit(main())
