"""Work that goes on behind the main thread's back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from sdpg_megatron.rollout.base import Stop

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """A call on a thread of its own, from now on. The thread does not keep a process from ending."""

    def __init__(self, work: Callable[[Stop], T]) -> None:
        """`work` is told whether it was cancelled."""
        self._cancelled = threading.Event()
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), name="behind", daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What the work returns or raises, when it is done."""
        return self._future.result()

    def cancel(self) -> None:
        """Tell the work that nobody wants it any more, and wait for its end."""
        self._cancelled.set()
        self._thread.join()

    def _run(self, work: Callable[[Stop], T]) -> None:
        try:
            self._future.set_result(work(self._cancelled.is_set))
        except BaseException as error:
            self._future.set_exception(error)
