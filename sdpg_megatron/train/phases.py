"""Phases of a step: shown, timed and watched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sdpg_megatron.observe.metrics import Metric
from sdpg_megatron.observe.progress import Progress
from sdpg_megatron.runtime.watchdog import Watchdog


class Phases:
    """Seconds spent in each phase."""

    def __init__(self, progress: Progress, watchdog: Watchdog) -> None:
        self._progress, self._watchdog = progress, watchdog
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Show and time a phase of `Watchdog` while entered."""
        self._progress.phase(name)
        started = time.perf_counter()
        with self._watchdog.phase(name):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, Metric]:
        """Metrics of all phases since the last call."""
        found = {f"time/{name}": Metric(spent) for name, spent in self._seconds.items()}
        self._seconds.clear()
        return found
