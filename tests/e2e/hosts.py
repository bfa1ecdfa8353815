"""Two hosts on one machine: network namespaces with a link between them that can be cut and slowed down."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdpg_megatron.train.presence import end_with_parent

PREFIX = "sdpg-test"
INTERFACE = "veth0"


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

    def slow(self, rate: str) -> None:
        """In both directions, for example "4mbit"."""
        for host in self._hosts:
            limit = ["rate", rate, "burst", "16kb", "latency", "500ms"]
            _do("tc", "-n", host.name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)

    def fast(self) -> None:
        for host in self._hosts:
            _do("tc", "-n", host.name, "qdisc", "del", "dev", INTERFACE, "root")


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
