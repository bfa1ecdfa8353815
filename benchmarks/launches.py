"""Count the head's torch calls per chunk of rows on the GPU code path, without a GPU.

Each call costs the host some microseconds; the GPU idles if the calls take longer than its work. Calls of torch's
dispatcher that are not views count, and launches of Triton kernels. These run in Triton's interpreter: set
TRITON_INTERPRET=1 before Triton is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.head_baselines import make_problem, ours
from sdpg_megatron.head import HeadOptions, VocabShard

ROWS, HIDDEN, VOCAB = 8, 16, 64
"""Sizes of a chunk. They do not affect the number of calls."""
GROUP = 4
"""Chunks per product of the weight gradient."""


@dataclass(frozen=True, slots=True)
class Launches:
    """Numbers of calls by name."""

    chunk: dict[str, float]
    """Calls per additional chunk. A product shared by several chunks is divided among them."""
    step: float
    """Other calls, per step, forward and backward."""

    @property
    def total(self) -> float:
        """Calls per additional chunk."""
        return sum(self.chunk.values())


@dataclass(slots=True)
class _Calls:
    counter: Counter[str] = field(default_factory=Counter)
    paused: bool = False


class _CountCalls(TorchDispatchMode):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns)
        if not view and not self.calls.paused:
            self.calls.counter[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    if not hasattr(InterpretedFunction, "run"):
        raise ImportError(f"found triton {triton.__version__}, expected 3.9 or newer. Fix: pip install -U triton")
    calls, run = _Calls(), InterpretedFunction.run

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        calls.counter[f"triton.{kernel.fn.__name__}"] += 1
        calls.paused = True  # do not count the interpreter's calls
        try:
            return run(kernel, *args, **kwargs)
        finally:
            calls.paused = False

    with mock.patch.object(InterpretedFunction, "run", counted), _CountCalls(calls):
        yield calls.counter


def count_launches() -> Launches:
    """Count the calls of a step with reverse KL and the benchmark's loss, with one tile per chunk, on one rank."""
    few, many = (_step_calls(chunks) for chunks in (GROUP, 3 * GROUP))
    chunk = {name: (many[name] - few[name]) / (2 * GROUP) for name in many if many[name] != few[name]}
    return Launches(chunk, sum(few.values()) - GROUP * sum(chunk.values()))


def _step_calls(chunks: int) -> Counter[str]:
    vocab = VocabShard(0, VOCAB, None)
    problem = make_problem(ROWS * chunks, HIDDEN, vocab, VOCAB, torch.float32, torch.device("cpu"))
    options = HeadOptions(kernels="triton", chunk_rows=ROWS, tile_columns=VOCAB, group_rows=GROUP * ROWS)
    with _counting() as counter:
        ours(problem, options)
    return counter


def report() -> str:
    """Table of the calls, most frequent first."""
    found = count_launches()
    lines = [f"{count:6.2f}  {name}" for name, count in sorted(found.chunk.items(), key=lambda item: -item[1])]
    return "\n".join([f"{found.total:6.2f}  calls per chunk, and {found.step:.0f} per step", *lines]) + "\n"
