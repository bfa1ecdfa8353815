"""Rendered prompts as Arrow tables, four bytes per token, in memory or in a file mapped by the ranks of a machine."""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
import pyarrow.ipc

from sdpg_megatron.records import Prompt

TOKENS = ("student_tokens", "teacher_tokens")
OTHERS = ("uid", "answer", "question", "history", "metadata")
"""Fields of a prompt that are pickled together, because they have arbitrary types."""
_SCHEMA = pyarrow.schema([*((name, pyarrow.list_(pyarrow.int32())) for name in TOKENS), ("others", pyarrow.binary())])
_NOTES = b"notes"


class PackedPrompts(Sequence[Prompt]):
    """Sequence of prompts that decodes each `Prompt` on access."""

    def __init__(self, batches: Sequence[Any]) -> None:
        """`batches`: Arrow record batches made by `pack`."""
        self._batches = list(batches)
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        if isinstance(index, slice):
            return tuple(self[position] for position in range(*index.indices(len(self))))
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        number = bisect_right(self._ends, position)
        batch = self._batches[number]
        row = position - (self._ends[number] - batch.num_rows)
        values: dict[str, Any] = dict(zip(OTHERS, pickle.loads(batch.column("others")[row].as_py()), strict=True))
        values |= {name: tuple(batch.column(name)[row].values.to_numpy().tolist()) for name in TOKENS}
        return Prompt(**values)

    def save(self, path: Path, notes: Mapping[str, Any]) -> None:
        """Write the prompts, and `notes`, to a file for `open_packed`. Raises `OSError`."""
        schema = _SCHEMA.with_metadata({_NOTES: pickle.dumps(dict(notes))})
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
            for batch in self._batches:
                writer.write_batch(batch)


def open_packed(path: Path) -> tuple[PackedPrompts, dict[str, Any]]:
    """Memory-map a file written by `PackedPrompts.save` in this job; return prompts and notes.

    All processes that map the file share its pages, which stay readable after the file is removed. The file contains
    pickles: do not open untrusted files. Raises `OSError`.
    """
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    return PackedPrompts(batches), pickle.loads(reader.schema.metadata[_NOTES])


def pack(prompts: Sequence[Prompt]) -> Any:
    """Convert prompts to an Arrow record batch."""
    columns = [_token_lists([getattr(prompt, name) for prompt in prompts]) for name in TOKENS]
    others = [pickle.dumps([getattr(prompt, name) for name in OTHERS]) for prompt in prompts]
    return pyarrow.record_batch([*columns, pyarrow.array(others, pyarrow.binary())], schema=_SCHEMA)


def _token_lists(rows: Sequence[Sequence[int]]) -> Any:
    offsets = np.array([0, *accumulate(map(len, rows))], np.int32)
    tokens: Iterator[int] = chain.from_iterable(rows)
    return pyarrow.ListArray.from_arrays(offsets, np.fromiter(tokens, np.int32, count=int(offsets[-1])))
