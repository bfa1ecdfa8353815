"""One machine's part of a run: rendezvous, start servers and ranks, monitor them, and stop them at the end."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import flatten, load_config
from sdpg_megatron.errors import ConfigError, LaunchError
from sdpg_megatron.launch.liveness import Liveness
from sdpg_megatron.launch.rendezvous import LaunchPlan, NodeInfo, check_port, free_port, rendezvous
from sdpg_megatron.launch.servers import Servers, prepare
from sdpg_megatron.launch.torchrun_process import TorchrunProcess

POLL_SECONDS = 0.2
"""Seconds between polls of the ranks, the servers and the other machines."""
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
"""Signals forwarded to the ranks. SIGHUP is handled until the rendezvous is complete, then ignored: a lost terminal
does not end a run."""
MAX_SIGNALS = 2
"""Signals before the next one ends this machine's part at once."""
PACKAGES = "sdpg-megatron", "torch", "megatron-core", "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Number and processes of this machine, and the address of machine 0; see `command`."""

    nodes: int
    node: int
    ranks: int
    servers: int
    address: str
    port: int
    meet_seconds: float
    lost_seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.node < self.nodes:
            fix = f"number the machines from 0 to {self.nodes - 1}"
            raise LaunchError("NODE_RANK", str(self.node), f"a number below NNODES ({self.nodes})", fix)
        if not self.ranks + self.servers:
            raise LaunchError("RANKS_PER_NODE", "neither ranks nor servers", "at least one", "leave this machine out")


class Machine:
    """Launcher of one machine. For a single run."""

    def __init__(
        self, node_config: NodeConfig, config: Path, overrides: Sequence[str], options: Sequence[str] = ()
    ) -> None:
        """
        Args:
            options: further options of ``sdpg-megatron train``.

        Raises:
            ConfigError: see `sdpg_megatron.config.load.load_config`.
        """
        self._node_config = node_config
        self._arguments = [str(config), *overrides, *options]
        self._options = options
        self._config = load_config(config, overrides)
        self._servers = Servers()
        self._ranks: TorchrunProcess | None = None
        self._liveness: Liveness | None = None
        self._signals = 0
        self._stop_requested = False
        self._stopped: signal.Signals | None = None
        if node_config.servers and self._config.rollout.sglang.urls:
            urls = list(self._config.rollout.sglang.urls)
            raise ConfigError("rollout.sglang.urls", urls, "none with SERVERS_PER_NODE", "leave one of them out")

    async def run(self) -> int:
        """Run from the rendezvous to the end.

        Returns:
            0 if the run is complete, 75 if it was stopped and has saved, 128 + the signal if it was stopped at once;
            otherwise the exit code of the first failed rank of this machine, or 1 if another machine failed.

        Raises:
            SdpgError: the run cannot start.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # as set by nohup
                continue
            loop.add_signal_handler(number, self._on_signal, number, task)
        try:
            async with AsyncExitStack() as stack:
                stack.callback(self._clean_up)
                plan, address = await self._meet(stack)
                return await self._work(plan, address)
        except asyncio.CancelledError:
            assert self._stopped is not None
            return 128 + self._stopped

    async def _meet(self, stack: AsyncExitStack) -> tuple[LaunchPlan, str]:
        node_config, config = self._node_config, self._config

        def servers(address: str) -> Sequence[str]:
            self._servers = prepare(
                config, count=node_config.servers, node=node_config.node, ranks=node_config.ranks, address=address
            )
            return self._servers.urls

        plan, connections, address = await rendezvous(
            _node_info(node_config, config, self._options),
            node_config.address,
            node_config.port,
            run_dir=config.run_dir,
            servers=servers,
            seconds=node_config.meet_seconds,
            stack=stack,
        )
        self._liveness = Liveness(node_config.node, plan, connections, node_config.lost_seconds)
        self._liveness.start()
        stack.push_async_callback(self._liveness.close)
        return plan, address

    async def _work(self, plan: LaunchPlan, address: str) -> int:
        node_config, liveness = self._node_config, self._liveness
        assert liveness is not None
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        environment = _environment(node_config, address)
        os.environ.update(environment)  # inherited by the servers
        self._servers.start()
        if node_config.ranks:
            self._ranks = TorchrunProcess(
                ["train", *self._arguments, *_served(plan)],
                node=plan.trainers.index(node_config.node),
                nodes=len(plan.trainers),
                ranks=node_config.ranks,
                address=node_config.address,
                port=self._port(),
                run=plan.run,
                logs=self._config.run_dir.absolute() / "logs" / f"node-{node_config.node}",
                environment={**os.environ, "PYTHONUNBUFFERED": "1", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": " "},
            )
        code = 1
        try:
            code = await self._watch(liveness)
        finally:
            liveness.end(code)
            if self._ranks is not None:
                self._ranks.kill()
        while node_config.node == 0 and not liveness.complete:  # machine 0 relays the others' messages
            liveness.abort_reason()
            await asyncio.sleep(POLL_SECONDS)
        return code

    async def _watch(self, liveness: Liveness) -> int:
        while True:
            code = liveness.trainers_code() if self._ranks is None else self._ranks.poll()
            if code is not None:
                return code
            if abort_reason := liveness.abort_reason():
                why, code = abort_reason
                _log(f"{why}. Ending this machine's ranks; the same command continues from the newest checkpoint")
                return code
            # Slurm signals all launchers: a second signal would end the ranks while they save.
            if liveness.stop_signal is not None and not self._stop_requested and self._ranks is not None:
                self._request_stop(liveness.stop_signal, "another machine's signal", self._ranks)
            self._servers.restart_ended()
            await asyncio.sleep(POLL_SECONDS)

    def _port(self) -> int:
        """Port of torchrun's store."""
        if self._node_config.nodes > 1:
            return self._node_config.port
        return check_port(self._node_config.port) if self._node_config.port else free_port()

    def _on_signal(self, number: signal.Signals, task: asyncio.Task[Any]) -> None:
        """Ask the ranks to stop; without ranks or peers, stop this launcher."""
        self._signals += 1
        self._stopped = number
        if self._liveness is None or self._signals > MAX_SIGNALS:
            task.cancel()
        elif self._ranks is None:
            if self._signals == 1:
                _log(f"{number.name} is forwarded to machine 0; the ranks save, and the same command continues")
                self._liveness.stop(number)
        elif self._signals > 1:
            _log(f"ending the ranks after a second {number.name}")
            self._ranks.signal(number)
        elif not self._stop_requested:  # not yet asked by another machine
            self._request_stop(number, number.name, self._ranks)

    def _request_stop(self, number: int, source: str, ranks: TorchrunProcess) -> None:
        _log(f"{source} is forwarded to the ranks; they save, and the same command continues")
        self._stop_requested = True
        ranks.signal(number)

    def _clean_up(self) -> None:
        if self._ranks is not None:
            self._ranks.kill()
        self._servers.close()


def _log(text: str) -> None:
    sys.stderr.write(f"launch: {text}\n")


def _node_info(node_config: NodeConfig, config: RunConfig, options: Sequence[str]) -> NodeInfo:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return NodeInfo(
        node=node_config.node,
        name=socket.gethostname(),
        nodes=node_config.nodes,
        ranks=node_config.ranks,
        servers=node_config.servers,
        config={**flatten(config.model_dump(mode="json")), "command line": " ".join(options)},
        versions=versions,
    )


def _served(plan: LaunchPlan) -> list[str]:
    return ["rollout.engine=sglang", f"rollout.sglang.urls=[{', '.join(plan.urls)}]"] if plan.urls else []


def _environment(node_config: NodeConfig, address: str) -> dict[str, str]:
    """Interface for Gloo; its default is the host name's, often the loopback."""
    if node_config.nodes == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return {"GLOO_SOCKET_IFNAME": name}
    return {}
