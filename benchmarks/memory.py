"""The most memory that a piece of a benchmark holds at a time."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

SAMPLE_SECONDS = 0.005
MIB = 1 << 20
M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: from how many bytes on a block is its own mapping, which goes back to the system when freed."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Afterwards the list holds one number: the most bytes in use within, beyond those in use at the start."""
    found: list[int] = []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - start)
        return
    _give_back_freed_memory()
    with _sampled() as samples:
        start = samples[0]
        mark = _reset_high_water()
        yield found
    # A counter that could not be set back says nothing unless it has risen.
    high = _high_water()
    found.append(max(samples[0], high if high > mark else 0) - start)


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """One number, the most resident bytes seen so far."""
    process = psutil.Process()
    most, done = [process.memory_info().rss], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            most[0] = max(most[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield most
    done.set()
    thread.join()


def _high_water() -> int:
    """Most resident bytes of this process, since the counter was last set back."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water() -> int:
    """Bytes above which the counter tells of something new: 0 where it could be set back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _high_water()
    return 0


def _give_back_freed_memory() -> None:
    """To the system: what is free now, and from now on every freed tensor of a MiB or more. Nothing but glibc can."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, MIB)
        library.malloc_trim(0)
