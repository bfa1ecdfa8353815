"""Peak memory of a code block."""

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
"""Parameter of glibc's mallopt: size in bytes from which blocks are mapped separately and unmapped when freed."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Measure the peak memory of a block. On exit the yielded list holds one number: peak less bytes at entry."""
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
    # A counter that could not be reset is only valid if it has increased.
    high = _high_water()
    found.append(max(samples[0], high if high > mark else 0) - start)


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """Sample the resident bytes on a thread. The yielded list holds one number, the maximum so far."""
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
    """Peak resident bytes of this process since the counter was last reset."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water() -> int:
    """Reset the counter. Returns the value above which it is valid: 0 after a reset, else its current value."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _high_water()
    return 0


def _give_back_freed_memory() -> None:
    """Return free memory to the system, now and for every tensor of at least 1 MiB freed later. Needs glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, MIB)
        library.malloc_trim(0)
