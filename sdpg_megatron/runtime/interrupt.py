"""Ctrl-C and SIGTERM stop a run after a save; before the rendezvous is complete, also SIGHUP, they end it at once."""

from __future__ import annotations

import os
import signal
from types import TracebackType

from sdpg_megatron.process.signals import STOPPED, SignalListener, leave, tell

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """While entered, the first of `SIGNALS` asks the run to stop; any second one ends the process at once.

    Until `defer` is called there is nothing to save: the first signal ends the process with exit code `STOPPED`. From
    then on SIGHUP is ignored, as under nohup, so that a run outlives its terminal. Under torchrun SIGHUP asks the run
    to stop: torchrun forwards it only when torchrun itself ends.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring, self._signals = False, 0
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._listener = SignalListener(handled, self._on_signal, self._request)

    def __enter__(self) -> Interrupt:
        self._listener.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.__exit__()

    def defer(self) -> None:
        """From now on the first signal only sets `requested`; the ranks agree on the step after which they stop."""
        self._deferring = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited by later child processes

    def _request(self) -> None:
        self.requested = self._deferring

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        self._signals += 1
        if self._signals > 1:
            leave(128 + number, f"{name}: ended at once; the same command continues from the last save")
        if not self._deferring:
            leave(STOPPED, f"{name}: stopped before the first step; the same command starts the run")
        self.requested = True
        if os.environ.get("RANK", "0") == "0":
            tell(f"{name}: the run saves and stops; a second signal ends it at once")
