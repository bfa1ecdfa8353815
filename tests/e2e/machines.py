"""Launchers on two hosts: to start them, see how they end, and read what they said."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from tests.e2e.hosts import Host, Link
from tests.e2e.runs import ROOT, environment

LIMIT = 280.0
"""Seconds that anything may take, on two cores that are busy otherwise."""
OVERRIDES = ["parallel.pipeline=2", "data.eval=[]", "eval.every=0"]


class Machines:
    """Two hosts, and the launchers on them."""

    def __init__(self, hosts: tuple[Host, Host], link: Link, folder: Path) -> None:
        self.hosts, self.link, self.folder = hosts, link, folder
        self._started = 0

    def launch(
        self, config: Path, *overrides: str, servers: tuple[int, int] = (0, 0), **variables: object
    ) -> list[subprocess.Popen[bytes]]:
        """The same command on both, with so many rollout servers on each."""
        self._started += 1
        settings = {"NNODES": 2, "MASTER_ADDR": self.hosts[0].address, "RANKS_PER_NODE": 1, "PYTHON": sys.executable}
        settings |= variables
        base = {name: value for name, value in environment().items() if name != "GLOO_SOCKET_IFNAME"}
        return [
            host.start(
                ["bash", str(ROOT / "scripts" / "launch.sh"), str(config), *OVERRIDES, *overrides],
                {**base, **_strings(settings), **_strings({"NODE_RANK": node, "SERVERS_PER_NODE": servers[node]})},
                self.log(node),
            )
            for node, host in enumerate(self.hosts)
        ]

    def log(self, node: int) -> Path:
        return self.folder / f"launch-{self._started}-{node}.log"

    def said(self, node: int) -> str:
        return self.log(node).read_text()

    def gave_each_other_up(self) -> bool:
        """Whether both launchers said that the other's machine is silent."""
        said = ((self.said(node), f"machine {1 - node} (") for node in (0, 1))
        return all(other in text and "has sent no heartbeat for" in text for text, other in said)

    def codes(self, launchers: list[subprocess.Popen[bytes]], limit: float = LIMIT) -> list[int]:
        """How both end, and that nothing of theirs is left."""
        deadline = time.monotonic() + limit
        found = [launcher.wait(timeout=max(0.1, deadline - time.monotonic())) for launcher in launchers]
        for host in self.hosts:
            left = [psutil.Process(pid).cmdline() for pid in host.processes()]
            assert not left
        return found

    def until(self, happened: Callable[[], bool], launchers: list[subprocess.Popen[bytes]]) -> None:
        """Wait for it, while both run."""
        deadline = time.monotonic() + LIMIT
        while not happened():
            assert time.monotonic() < deadline
            assert all(launcher.poll() is None for launcher in launchers), self.said(0) + self.said(1)
            time.sleep(0.05)


def _strings(variables: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items()}
