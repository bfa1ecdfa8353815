"""Cancellable calls on a daemon thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from sdpg_megatron.rollout.base import Stop

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """A call that starts at once on a daemon thread, which does not keep the process alive."""

    def __init__(self, work: Callable[[Stop], T]) -> None:
        """`work` gets a function that returns True after `cancel`."""
        self._cancelled = threading.Event()
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), name="background", daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Wait for the call, and return or raise its result."""
        return self._future.result()

    def cancel(self) -> None:
        """Request cancellation, and wait for the thread to end."""
        self._cancelled.set()
        self._thread.join()

    def _run(self, work: Callable[[Stop], T]) -> None:
        try:
            self._future.set_result(work(self._cancelled.is_set))
        except BaseException as error:
            self._future.set_exception(error)
