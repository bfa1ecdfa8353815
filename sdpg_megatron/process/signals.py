"""Stop signals, handled on a thread while the main thread is in a collective or another long call."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

STOPPED = os.EX_TEMPFAIL
"""Exit code, 75, of a run that was stopped, has saved its state and can continue. It is the temporary failure of
sysexits.h, and differs from every code of a process that a signal ended."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code, 130, of a process that Ctrl-C ended."""


def exit_at_once() -> None:
    """Make Ctrl-C end this process with one line and exit code 130.

    Used before there is anything to clean up. KeyboardInterrupt does not suffice: modules that are being imported
    swallow it or turn it into an ImportError.
    """
    signal.signal(signal.SIGINT, lambda number, frame: leave(INTERRUPTED, "stopped"))


def leave(code: int, text: str) -> NoReturn:
    """Write a line to standard error and end this process without cleanup. Thread-safe."""
    tell(text)
    os._exit(code)


def tell(text: str) -> None:
    """Write a line to standard error, bypassing Python's stream, which a signal may have interrupted."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


class SignalListener:
    """Context manager that handles signals on a thread at once.

    Python runs signal handlers on the main thread only, and only after a call into C returns, such as a collective that
    waits for another rank. Signals to forked children are not handled.
    """

    def __init__(self, numbers: Sequence[int], act: Callable[[int], None], on_main: Callable[[], None] | None) -> None:
        """
        Args:
            numbers: signals to handle.
            act: called on the thread, with the signal's number.
            on_main: called on the main thread when it next runs Python code; may raise.
        """
        self._numbers, self._act, self._on_main = numbers, act, on_main
        self._process = os.getpid()

    def __enter__(self) -> SignalListener:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous: dict[int, Any] = {number: signal.signal(number, self._handle) for number in self._numbers}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        _listening.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _listening.remove(self)
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python
        self._write.close()  # ends the thread

    def _listen(self) -> None:
        while received := self._read.recv(64):
            for number in received:
                if number in self._numbers:
                    self._act(number)
        self._read.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child: ignore its first signal, then restore the defaults
            for handled in self._numbers:
                signal.signal(handled, signal.SIG_DFL)
        elif self._on_main is not None:
            self._on_main()


_listening: list[SignalListener] = []


def _forget_parent() -> None:
    """Detach a forked child from the socket of the parent's thread, so that the child's signals do not reach it."""
    if _listening:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt, for work that has files or processes to clean up.

    A second Ctrl-C ends the process at once. KeyboardInterrupt is raised also if other code has replaced it by another
    exception, as imports do.
    """
    count = raised = 0

    def act(number: int) -> None:
        nonlocal count
        count += 1
        if count > 1:
            leave(INTERRUPTED, "stopped at once")

    def interrupt() -> None:
        nonlocal raised
        raised += 1
        raise KeyboardInterrupt

    with SignalListener([signal.SIGINT], act, interrupt):
        try:
            yield
        except Exception as error:
            if raised:
                raise KeyboardInterrupt from error
            raise
