"""Rendezvous of all machines of a run, with a check that they are configured for the same run.

Machine 0 listens; the others connect. It compares their versions and configurations, has each look for a file that it
wrote to the run's folder, and sends all of them the plan or the error. The connections stay open for `liveness`.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdpg_megatron.errors import LaunchError, SdpgError, reason_of
from sdpg_megatron.launch.connection import MAX_LINE_BYTES, Connection
from sdpg_megatron.rollout.sglang.server import hold_free_port

RETRY_SECONDS = 0.5
"""Seconds between attempts to reach machine 0."""
VISIBLE_SECONDS = 5.0
"""Time for one machine to see another's new file: network file systems cache directory listings for some seconds."""
ANSWER_SECONDS = 300.0
"""Bound of one machine's answer after all have connected; a machine with servers imports torch first."""
MARK = ".launch-"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """One machine's name, counts, configuration and versions."""

    node: int
    name: str
    """Host name, for messages."""
    nodes: int
    ranks: int
    servers: int
    config: Mapping[str, Any]
    """Resolved configuration of the run, by dotted field names."""
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"machine {self.node} ({self.name})"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Result of the rendezvous, the same on all machines."""

    run: str
    """Identifier of this start of the run."""
    machines: Mapping[int, str]
    """Name of each machine in messages."""
    trainers: tuple[int, ...]
    """Machines with ranks, in order."""
    urls: tuple[str, ...]
    """URLs of all rollout servers that the machines start."""


ServersAt = Callable[[str], Sequence[str]]
"""Prepare this machine's servers for its address, which the rendezvous determines; returns their URLs."""


async def rendezvous(
    node_info: NodeInfo,
    address: str,
    port: int,
    *,
    run_dir: Path,
    servers: ServersAt,
    seconds: float,
    stack: AsyncExitStack,
) -> tuple[LaunchPlan, dict[int, Connection], str]:
    """Return the plan, the connections and this machine's address.

    Machine 0 has a connection to every other machine, each of the others one to machine 0.

    Args:
        seconds: bound of the wait for all machines.
        stack: closes the connections.

    Raises:
        LaunchError: machines are missing or cannot form one run; raised on all that connected.
    """
    if node_info.node == 0:
        return await _host(node_info, address, port, run_dir, servers, seconds, stack)
    return await _join(node_info, address, port, run_dir, servers, seconds, stack)


# --- machine 0


async def _host(
    node_info: NodeInfo,
    address: str,
    port: int,
    run_dir: Path,
    servers: ServersAt,
    seconds: float,
    stack: AsyncExitStack,
) -> tuple[LaunchPlan, dict[int, Connection], str]:
    arrivals: asyncio.Queue[tuple[NodeInfo, Connection]] = asyncio.Queue()
    node_infos, connections = {0: node_info}, dict[int, Connection]()
    mark = run_dir / f"{MARK}{secrets.token_hex(8)}"
    try:
        if node_info.nodes > 1:
            stack.callback((await _listen(address, port, arrivals)).close)
        await _gather(node_info, seconds, arrivals, node_infos, connections, stack)
        if difference := disagreement(list(node_infos.values())):
            raise difference
        _write_mark(mark)
        for connection in connections.values():
            connection.send(mark=mark.name)
        own_address = connections[min(connections)].own_address if connections else address
        urls = [*servers(own_address)]
        for node, connection in sorted(connections.items()):
            urls += await _receive_urls(node_infos[node], connection)
        trainers = tuple(node for node in sorted(node_infos) if node_infos[node].ranks)
        names = {node: str(node_infos[node]) for node in sorted(node_infos)}
        plan = LaunchPlan(f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}", names, trainers, tuple(urls))
        for connection in connections.values():
            connection.send(plan=asdict(plan))
        return plan, connections, own_address
    except SdpgError as error:
        for connection in connections.values():
            connection.send(refused=str(error))
        raise
    finally:
        mark.unlink(missing_ok=True)


async def _listen(address: str, port: int, arrivals: asyncio.Queue[tuple[NodeInfo, Connection]]) -> asyncio.Server:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        try:
            node_info = await connection.receive(ANSWER_SECONDS)
            await arrivals.put((NodeInfo(**(node_info or {})), connection))
        except (TimeoutError, TypeError, ValueError):  # not a launcher
            await connection.close()

    family = resolve(address, port)
    for wanted in (port, port + 1):
        check_port(wanted, family)
    return await asyncio.start_server(
        greet, "::" if family == socket.AF_INET6 else "0.0.0.0", port + 1, limit=MAX_LINE_BYTES
    )


def resolve(address: str, port: int) -> socket.AddressFamily:
    """Address family of machine 0.

    Raises:
        LaunchError: the address cannot be resolved.
    """
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        fix = "set it to an address of machine 0 that all machines reach"
        raise LaunchError("MASTER_ADDR", f"{address} ({reason_of(error)})", "a known address", fix) from error


def check_port(port: int, family: socket.AddressFamily = socket.AF_INET) -> int:
    """Return the port if it is free.

    Raises:
        LaunchError: the port is in use.
    """
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            fix = "end the program that listens there (another run?), or choose another MASTER_PORT for all machines"
            found = f"port {port} of this machine in use ({error.strerror})"
            raise LaunchError("MASTER_PORT", found, "two free ports, MASTER_PORT and the next", fix) from error
    return port


def free_port() -> int:
    """Choose a port that no outgoing connection gets before torchrun listens there, seconds later."""
    with hold_free_port("0.0.0.0") as held:
        port: int = held.getsockname()[1]
        return port


async def _gather(
    node_info: NodeInfo,
    seconds: float,
    arrivals: asyncio.Queue[tuple[NodeInfo, Connection]],
    node_infos: dict[int, NodeInfo],
    connections: dict[int, Connection],
    stack: AsyncExitStack,
) -> None:
    deadline = time.monotonic() + seconds
    while len(node_infos) < node_info.nodes:
        try:
            peer, connection = await asyncio.wait_for(arrivals.get(), deadline - time.monotonic())
        except TimeoutError:
            _drop_closed(node_infos, connections)
            there = ", ".join(map(str, node_infos.values()))
            missing = ", ".join(str(node) for node in range(node_info.nodes) if node not in node_infos)
            fix = "start the same command there with their NODE_RANK; let them reach MASTER_PORT and the port after it"
            raise LaunchError(f"after {seconds:g} s", there, f"machines {missing} as well", fix) from None
        stack.push_async_callback(connection.close)
        _drop_closed(node_infos, connections)
        if (taken := node_infos.get(peer.node)) or not 0 < peer.node < node_info.nodes or peer.nodes != node_info.nodes:
            found = f"{peer} of {peer.nodes}" + (f" beside {taken}" if taken else "")
            fix = "give every machine its own NODE_RANK from 0 on, and the same NNODES"
            error = LaunchError("NODE_RANK", found, f"{node_info.nodes} machines, each with another number", fix)
            connection.send(refused=str(error))
            raise error
        node_infos[peer.node], connections[peer.node] = peer, connection


def _drop_closed(node_infos: dict[int, NodeInfo], connections: dict[int, Connection]) -> None:
    """Remove machines that have disconnected: they may be restarted and connect again."""
    for node in [node for node, connection in connections.items() if connection.closed]:
        del node_infos[node], connections[node]


def disagreement(node_infos: Sequence[NodeInfo]) -> LaunchError | None:
    """Error that says why these machines cannot form one run; None if they can."""
    first, *others = sorted(node_infos, key=lambda node_info: node_info.node)
    if not first.ranks:
        return LaunchError("RANKS_PER_NODE", "0 on machine 0", "ranks there", "give machine 0 ranks")
    for node_info in others:
        if node_info.ranks not in (0, first.ranks):
            found = f"{node_info.ranks} on {node_info}, {first.ranks} on {first}"
            return LaunchError("RANKS_PER_NODE", found, "the same on all machines that have ranks", "set it alike")
        for part, mine, theirs, fix in (
            ("versions", first.versions, node_info.versions, "install the same on all machines"),
            ("arguments", first.config, node_info.config, "give all machines the same CONFIG and overrides"),
        ):
            differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
            if differing:
                found = "; ".join(f"{name} {mine.get(name)!r} and {theirs.get(name)!r}" for name in differing)
                return LaunchError(f"{part} of {first} and {node_info}", found, "the same", fix)
    return None


def _write_mark(mark: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        found = f"{mark.parent} ({error.strerror})"
        raise LaunchError("run_dir", found, "a folder that can be written", "choose another, or mount it") from error


async def _receive_urls(node_info: NodeInfo, connection: Connection) -> list[str]:
    """URLs of a machine's servers."""
    try:
        answer = await connection.receive(ANSWER_SECONDS)
    except TimeoutError:
        answer = {"error": f"no answer in {ANSWER_SECONDS:g} s"}
    if answer is None:
        answer = {"error": "its launcher has ended"}
    if "error" in answer:
        raise LaunchError(str(node_info), answer["error"], "a working launcher", "see the errors of that machine")
    if not answer["shares_run_dir"]:
        found = f"a folder of {node_info} alone: it does not have the file that machine 0 has written there"
        fix = "use a run_dir on a disk that all machines with ranks share"
        raise LaunchError("run_dir", found, "one folder for all machines", fix)
    urls: list[str] = answer["urls"]
    return urls


# --- the others


async def _join(
    node_info: NodeInfo,
    address: str,
    port: int,
    run_dir: Path,
    servers: ServersAt,
    seconds: float,
    stack: AsyncExitStack,
) -> tuple[LaunchPlan, dict[int, Connection], str]:
    connection = await _connect(address, port + 1, seconds)
    stack.push_async_callback(connection.close)
    connection.send(**asdict(node_info))
    reply = await _receive(connection, seconds + VISIBLE_SECONDS)
    # Servers only write logs there, so a machine without ranks may have another folder.
    shares_run_dir = not node_info.ranks or await _wait_for_mark(run_dir / reply["mark"])
    try:
        urls = list(servers(connection.own_address)) if shares_run_dir else []
    except Exception as error:
        connection.send(error=str(error))
        raise
    connection.send(shares_run_dir=shares_run_dir, urls=urls)
    found = (await _receive(connection, ANSWER_SECONDS * node_info.nodes))["plan"]
    machines = {int(node): name for node, name in found["machines"].items()}
    plan = LaunchPlan(found["run"], machines, tuple(found["trainers"]), tuple(found["urls"]))
    return plan, {0: connection}, connection.own_address


async def _connect(address: str, port: int, seconds: float) -> Connection:
    deadline = time.monotonic() + seconds
    while True:
        try:
            async with asyncio.timeout(max(RETRY_SECONDS, min(deadline - time.monotonic(), 10.0))):
                return Connection(*await asyncio.open_connection(address, port, limit=MAX_LINE_BYTES))
        except (OSError, TimeoutError) as error:
            if time.monotonic() > deadline:
                found = f"no answer from {address} port {port} in {seconds:g} s ({_reason(error)})"
                fix = (
                    "start machine 0 (NODE_RANK=0), check MASTER_ADDR and MASTER_PORT, and open that port and the one "
                    "before it"
                )
                raise LaunchError("MASTER_ADDR", found, "machine 0, waiting there", fix) from error
        await asyncio.sleep(RETRY_SECONDS)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or "timed out"


async def _receive(connection: Connection, seconds: float) -> dict[str, Any]:
    try:
        reply = await connection.receive(seconds)
    except TimeoutError:
        reply = {"refused": f"machine 0 has sent nothing for {seconds:g} s"}
    if reply is None:
        reply = {"refused": "machine 0 has ended; see its errors"}
    if "refused" in reply:
        raise LaunchError.of_text(reply["refused"])
    return reply


async def _wait_for_mark(mark: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(RETRY_SECONDS)
    return True
