"""A second CUDA stream for elementwise work, beside the products on the caller's stream.

Products keep the tensor cores busy and leave most of the memory bandwidth; elementwise work is the other way round. The
host waits for neither stream: `fork` and `join` order the streams by events alone.

Memory. torch's allocator gives a block back to the stream it was allocated on as soon as its tensor is gone. The rule
that keeps this right without `record_stream`: tensors that both streams use are allocated on the caller's stream and
live until after a `join`, and what is allocated in a `fork` is used there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the device's second stream: one for all calls, so that they share its cached memory.

    Its priority is the higher one: where kernels of both streams are ready, its blocks are placed first.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]  # torch leaves it untyped


class Streams:
    """The caller's stream and a second one; without the second, `fork` and `join` do nothing."""

    def __init__(
        self, pair: tuple[Any, Any] | None, use: Callable[[Any], AbstractContextManager[Any]] = torch.cuda.stream
    ) -> None:
        """`pair`: a `torch.cuda.Stream` each. `use`: make one the current stream."""
        self._pair = pair
        self._use = use

    @classmethod
    def of(cls, device: torch.device, *, overlap: bool) -> Streams:
        """Two streams where `overlap` is asked for on a GPU."""
        if not overlap or device.type != "cuda":
            return cls(None)
        main = torch.cuda.current_stream(device)
        return cls((main, _second_stream(main.device)))

    def mark(self) -> Any:
        """Return the present end of the caller's stream, for `fork`: an event, or None without a second stream."""
        return None if self._pair is None else self._pair[0].record_event()

    @contextmanager
    def fork(self, mark: Any) -> Iterator[None]:
        """Run the body on the second stream, after the work that the caller's stream had at the `mark`."""
        if self._pair is None:
            yield
            return
        _, second = self._pair
        second.wait_event(mark)
        try:
            with self._use(second):
                yield
        except BaseException:
            self.join()  # before the tensors in use are freed
            raise

    def join(self) -> None:
        """Make the caller's stream wait for all forked work."""
        if self._pair is not None:
            main, second = self._pair
            main.wait_stream(second)
