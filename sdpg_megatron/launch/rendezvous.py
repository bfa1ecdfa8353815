"""All machines of a run come together before anything starts, and find out whether they mean the same run.

Machine 0 listens; the others come to it. It compares what they bring, has each look for a file that it put into the
run's folder, and tells all of them the plan, or why there is none. The connections stay: see `circle.py`.
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
from sdpg_megatron.launch.connection import LIMIT, Connection
from sdpg_megatron.rollout.sglang.server import hold_free_port

AGAIN = 0.5
"""Seconds between attempts to reach machine 0."""
LOOK_SECONDS = 5.0
"""Until a file that one machine wrote is seen by another: network disks keep lists of files for some seconds."""
ANSWER_SECONDS = 300.0
"""Bound of one machine's answer when all are there; one with servers imports much before it."""
MARK = ".launch-"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """What a machine brings."""

    node: int
    name: str
    """The machine's own, for messages."""
    nodes: int
    ranks: int
    servers: int
    config: Mapping[str, Any]
    """The run's resolved configuration, by dotted names."""
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"machine {self.node} ({self.name})"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What all machines know when they part."""

    run: str
    """Names this start of the run."""
    machines: Mapping[int, str]
    """How messages call each of them."""
    trainers: tuple[int, ...]
    """The machines with ranks, in order."""
    urls: tuple[str, ...]
    """Of all rollout servers that the machines start."""


ServersAt = Callable[[str], Sequence[str]]
"""Prepare this machine's servers for its address, which the meeting finds out; their URLs."""


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
    """The plan, the connections (of machine 0 to all others, of another to machine 0), and this machine's address.

    Args:
        seconds: until all machines have to be there.
        stack: closes the connections.

    Raises:
        LaunchError: machines do not come, or cannot be one run; on all that came.
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
    came: asyncio.Queue[tuple[NodeInfo, Connection]] = asyncio.Queue()
    node_infos, connections = {0: node_info}, dict[int, Connection]()
    mark = run_dir / f"{MARK}{secrets.token_hex(8)}"
    try:
        if node_info.nodes > 1:
            stack.callback((await _listen(address, port, came)).close)
        await _gather(node_info, seconds, came, node_infos, connections, stack)
        if difference := disagreement(list(node_infos.values())):
            raise difference
        _put(mark)
        for connection in connections.values():
            connection.say(mark=mark.name)
        own_address = connections[min(connections)].own_address if connections else address
        urls = [*servers(own_address)]
        for node, connection in sorted(connections.items()):
            urls += await _answer(node_infos[node], connection)
        trainers = tuple(node for node in sorted(node_infos) if node_infos[node].ranks)
        names = {node: str(node_infos[node]) for node in sorted(node_infos)}
        plan = LaunchPlan(f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}", names, trainers, tuple(urls))
        for connection in connections.values():
            connection.say(plan=asdict(plan))
        return plan, connections, own_address
    except SdpgError as error:
        for connection in connections.values():
            connection.say(refused=str(error))
        raise
    finally:
        mark.unlink(missing_ok=True)


async def _listen(address: str, port: int, came: asyncio.Queue[tuple[NodeInfo, Connection]]) -> asyncio.Server:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        try:
            node_info = await connection.hear(ANSWER_SECONDS)
            await came.put((NodeInfo(**(node_info or {})), connection))
        except (TimeoutError, TypeError, ValueError):  # not one of us
            await connection.close()

    family = resolve(address, port)
    for wanted in (port, port + 1):
        check_port(wanted, family)
    return await asyncio.start_server(greet, "::" if family == socket.AF_INET6 else "0.0.0.0", port + 1, limit=LIMIT)


def resolve(address: str, port: int) -> socket.AddressFamily:
    """Of which kind the address of machine 0 is.

    Raises:
        LaunchError: it is unknown here.
    """
    try:
        return socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        fix = "set it to an address of machine 0 that all machines reach"
        raise LaunchError("MASTER_ADDR", f"{address} ({reason_of(error)})", "a known address", fix) from error


def check_port(port: int, family: socket.AddressFamily = socket.AF_INET) -> int:
    """The port.

    Raises:
        LaunchError: something listens there.
    """
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            fix = "end what listens there (another run?), or choose another MASTER_PORT, the same on all machines"
            found = f"port {port} of this machine in use ({error.strerror})"
            raise LaunchError("MASTER_PORT", found, "two free ports, MASTER_PORT and the next", fix) from error
    return port


def free_port() -> int:
    """One that no outgoing connection gets until torchrun listens there, seconds later."""
    with hold_free_port("0.0.0.0") as held:
        port: int = held.getsockname()[1]
        return port


async def _gather(
    node_info: NodeInfo,
    seconds: float,
    came: asyncio.Queue[tuple[NodeInfo, Connection]],
    node_infos: dict[int, NodeInfo],
    connections: dict[int, Connection],
    stack: AsyncExitStack,
) -> None:
    deadline = time.monotonic() + seconds
    while len(node_infos) < node_info.nodes:
        try:
            guest, connection = await asyncio.wait_for(came.get(), deadline - time.monotonic())
        except TimeoutError:
            _drop_gone(node_infos, connections)
            there = ", ".join(map(str, node_infos.values()))
            missing = ", ".join(str(node) for node in range(node_info.nodes) if node not in node_infos)
            fix = "start the same command there with their NODE_RANK; let them reach MASTER_PORT and the port after it"
            raise LaunchError(f"after {seconds:g} s", there, f"machines {missing} as well", fix) from None
        stack.push_async_callback(connection.close)
        _drop_gone(node_infos, connections)
        if (
            (taken := node_infos.get(guest.node))
            or not 0 < guest.node < node_info.nodes
            or guest.nodes != node_info.nodes
        ):
            found = f"{guest} of {guest.nodes}" + (f" beside {taken}" if taken else "")
            fix = "give every machine its own NODE_RANK from 0 on, and the same NNODES"
            error = LaunchError("NODE_RANK", found, f"{node_info.nodes} machines, each with a number of its own", fix)
            connection.say(refused=str(error))
            raise error
        node_infos[guest.node], connections[guest.node] = guest, connection


def _drop_gone(node_infos: dict[int, NodeInfo], connections: dict[int, Connection]) -> None:
    """Forget machines that came and ended: they may be started again, and come again."""
    for node in [node for node, connection in connections.items() if connection.gone]:
        del node_infos[node], connections[node]


def disagreement(node_infos: Sequence[NodeInfo]) -> LaunchError | None:
    """Why these machines cannot be one run, from what they bring."""
    first, *others = sorted(node_infos, key=lambda node_info: node_info.node)
    if not first.ranks:
        return LaunchError("RANKS_PER_NODE", "0 on machine 0", "ranks there", "give machine 0 ranks")
    for node_info in others:
        if node_info.ranks not in (0, first.ranks):
            found = f"{node_info.ranks} on {node_info}, {first.ranks} on {first}"
            return LaunchError("RANKS_PER_NODE", found, "the same on all machines that have ranks", "set it alike")
        for what, mine, theirs, fix in (
            ("versions", first.versions, node_info.versions, "install the same on all machines"),
            ("arguments", first.config, node_info.config, "give all machines the same CONFIG and overrides"),
        ):
            differing = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
            if differing:
                found = "; ".join(f"{name} {mine.get(name)!r} and {theirs.get(name)!r}" for name in differing)
                return LaunchError(f"{what} of {first} and {node_info}", found, "the same", fix)
    return None


def _put(mark: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        found = f"{mark.parent} ({error.strerror})"
        raise LaunchError("run_dir", found, "a folder that can be written", "choose another, or mount it") from error


async def _answer(node_info: NodeInfo, connection: Connection) -> list[str]:
    """The URLs of a machine's servers."""
    try:
        answer = await connection.hear(ANSWER_SECONDS)
    except TimeoutError:
        answer = {"trouble": f"no answer in {ANSWER_SECONDS:g} s"}
    if answer is None:
        answer = {"trouble": "it has ended"}
    if "trouble" in answer:
        raise LaunchError(str(node_info), answer["trouble"], "a machine that can take part", "see what it says itself")
    if not answer["sees"]:
        found = f"a folder of {node_info} alone: it lacks what machine 0 has just written there"
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
    connection = await _reach(address, port + 1, seconds)
    stack.push_async_callback(connection.close)
    connection.say(**asdict(node_info))
    told = await _told(connection, seconds + LOOK_SECONDS)
    # Servers write logs there and read nothing, so a machine with servers alone may have a folder of its own.
    sees = not node_info.ranks or await _sees(run_dir / told["mark"])
    try:
        urls = list(servers(connection.own_address)) if sees else []
    except Exception as error:
        connection.say(trouble=str(error))
        raise
    connection.say(sees=sees, urls=urls)
    found = (await _told(connection, ANSWER_SECONDS * node_info.nodes))["plan"]
    machines = {int(node): name for node, name in found["machines"].items()}
    plan = LaunchPlan(found["run"], machines, tuple(found["trainers"]), tuple(found["urls"]))
    return plan, {0: connection}, connection.own_address


async def _reach(address: str, port: int, seconds: float) -> Connection:
    deadline = time.monotonic() + seconds
    while True:
        try:
            async with asyncio.timeout(max(AGAIN, min(deadline - time.monotonic(), 10.0))):
                return Connection(*await asyncio.open_connection(address, port, limit=LIMIT))
        except (OSError, TimeoutError) as error:
            if time.monotonic() > deadline:
                found = f"no answer from {address} port {port} in {seconds:g} s ({_reason(error)})"
                fix = (
                    "start machine 0 (NODE_RANK=0), check MASTER_ADDR and MASTER_PORT, and open that port and the one "
                    "before it"
                )
                raise LaunchError("MASTER_ADDR", found, "machine 0, waiting there", fix) from error
        await asyncio.sleep(AGAIN)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or "timed out"


async def _told(connection: Connection, seconds: float) -> dict[str, Any]:
    try:
        told = await connection.hear(seconds)
    except TimeoutError:
        told = {"refused": f"machine 0 says nothing for {seconds:g} s"}
    if told is None:
        told = {"refused": "machine 0 has ended; what it says itself may tell why"}
    if "refused" in told:
        raise LaunchError.of_text(told["refused"])
    return told


async def _sees(mark: Path) -> bool:
    deadline = time.monotonic() + LOOK_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(AGAIN)
    return True
