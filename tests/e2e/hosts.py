"""Two hosts on one machine: network namespaces with a link between them that can be cut and slowed down."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdpg_megatron.runtime.run_lock import end_with_parent

PREFIX = "sdpg-test"
INTERFACE = "veth0"
BURST = 16 << 10
"""Bytes that a slow link lets through at once."""


def _do(*arguments: object) -> str:
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def why_not() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if missing := [program for program in ("ip", "tc") if shutil.which(program) is None]:
        return f"needs {missing[0]} (iproute2)"
    try:
        with two_hosts():
            return None
    except OSError as error:
        return f"needs network namespaces ({error})"


@dataclass(frozen=True)
class Host:
    name: str
    """Of its namespace."""
    address: str

    def start(self, command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command there, which writes to `log` and ends with this process. Its process id is the command's."""
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env=dict(environment),
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )

    def sent(self) -> int:
        """Bytes, on the link."""
        told = json.loads(_do("ip", "-n", self.name, "-s", "-j", "link", "show", "dev", INTERFACE))
        sent: int = told[0]["stats64"]["tx"]["bytes"]
        return sent

    def processes(self) -> list[int]:
        return [int(pid) for pid in _do("ip", "netns", "pids", self.name).split()]


class Link:
    """Between the two."""

    def __init__(self, hosts: tuple[Host, Host]) -> None:
        self._hosts = hosts

    def cut(self) -> None:
        _do("ip", "-n", self._hosts[1].name, "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        _do("ip", "-n", self._hosts[1].name, "link", "set", INTERFACE, "up")

    def slow(self, rate: int) -> None:
        """In both directions, to so many bits a second."""
        for host in self._hosts:
            limit = ["rate", f"{rate}bit", "burst", BURST, "latency", "500ms"]
            _do("tc", "-n", host.name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)

    def held_back(self) -> list[int]:
        """How often each host had more to send than `slow` lets through."""
        told = [
            json.loads(_do("tc", "-n", host.name, "-s", "-j", "qdisc", "show", "dev", INTERFACE))
            for host in self._hosts
        ]
        return [sum(queue["overlimits"] for queue in queues if queue["kind"] == "tbf") for queues in told]

    def fast(self) -> None:
        for host in self._hosts:
            _do("tc", "-n", host.name, "qdisc", "del", "dev", INTERFACE, "root")


class Meter:
    """How fast a host sends, as far as it is looked at."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._looks: list[tuple[float, int, float]] = []

    def look(self) -> None:
        before = time.monotonic()
        self._looks.append((before, self._host.sent(), time.monotonic()))

    def highest(self, seconds: float) -> float:
        """Bits a second over so many seconds or more. Not overstated: what looks themselves took counts as time."""
        return max(
            8 * (sent - since) / (after - before)
            for (before, since, _), (later, sent, after) in itertools.combinations(self._looks, 2)
            if later - before > seconds
        )


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Link]]:
    """They, and whatever runs on them, are gone at the end. What a killed test process left is removed first."""
    _sweep()
    hosts = tuple(Host(f"{PREFIX}-{os.getpid()}-{n}", f"198.18.0.{n + 1}") for n in range(2))
    try:
        for host in hosts:
            _do("ip", "netns", "add", host.name)
        names = [host.name for host in hosts]
        _do(
            "ip", "-n", names[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", names[1]
        )
        for host in hosts:
            _do("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _do("ip", "-n", host.name, "link", "set", device, "up")
        yield hosts[0], hosts[1], Link((hosts[0], hosts[1]))
    finally:
        for host in hosts:
            _remove(host.name)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _do("ip", "netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def _sweep() -> None:
    for name in _namespaces():
        if not Path(f"/proc/{name.split('-')[2]}").exists():
            _remove(name)


def _remove(name: str) -> None:
    if name in _namespaces():
        for pid in _do("ip", "netns", "pids", name).split():
            os.kill(int(pid), signal.SIGKILL)
        _do("ip", "netns", "del", name)
