"""Signals that ask this process to end, also while the main thread is in a collective or in another long call."""

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
"""Exit code, 75, of a run that was asked to stop, has saved its state and can continue: what sysexits calls a temporary
failure, to be tried again, and what no death by a signal looks like."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code, 130, of a process that Ctrl-C has ended."""


def exit_at_once() -> None:
    """From now on Ctrl-C ends this process with one line and exit code 130.

    For the time before there is anything to clean up. A KeyboardInterrupt would not do: while modules are imported,
    other code swallows it or turns it into an ImportError.
    """
    signal.signal(signal.SIGINT, lambda number, frame: leave(INTERRUPTED, "stopped"))


def leave(code: int, told: str) -> NoReturn:
    """Write a line to standard error and end this process, without any cleaning up; from any thread."""
    tell(told)
    os._exit(code)


def tell(text: str) -> None:
    """Write a line to standard error past Python's stream, which a signal may have interrupted."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


class SignalListener:
    """While entered, a thread is told of signals at once.

    A handler in Python runs on the main thread alone, and only when that is done with a call into C, such as a
    collective that waits for another rank. Forked children are not listened to.
    """

    def __init__(self, numbers: Sequence[int], act: Callable[[int], None], on_main: Callable[[], None] | None) -> None:
        """
        Args:
            numbers: signals to listen to.
            act: called on the thread, with the signal's number.
            on_main: called on the main thread as soon as that runs Python code again; may raise.
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
        self._write.close()  # which ends the thread

    def _listen(self) -> None:
        while received := self._read.recv(64):
            for number in received:
                if number in self._numbers:
                    self._act(number)
        self._read.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child: its first signal is its parent's, the second its own
            for handled in self._numbers:
                signal.signal(handled, signal.SIG_DFL)
        elif self._on_main is not None:
            self._on_main()


_listening: list[SignalListener] = []


def _forget_parent() -> None:
    """In a forked child: signals to it must not reach the thread of the parent, with which it shares the socket."""
    if _listening:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def interruptible() -> Iterator[None]:
    """While entered, Ctrl-C raises KeyboardInterrupt, for work that has files or processes to clean up.

    A second Ctrl-C ends the process at once. Where other code replaces the exception by one of its own, as imports do,
    KeyboardInterrupt is raised all the same.
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
