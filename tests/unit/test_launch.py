"""Machines that meet before a run, or find out why they cannot; what they learn of each other while it goes on, and how
it is stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sdpg_megatron.errors import LaunchError
from sdpg_megatron.launch import command as entry
from sdpg_megatron.launch import liveness, machine, rendezvous, torchrun
from sdpg_megatron.launch.connection import Connection
from sdpg_megatron.launch.liveness import Liveness
from sdpg_megatron.launch.machine import Machine, NodeConfig, _node_info
from sdpg_megatron.launch.rendezvous import LaunchPlan, NodeInfo
from sdpg_megatron.launch.servers import Servers
from sdpg_megatron.launch.torchrun_process import TorchrunProcess

ROOT = Path(__file__).parents[2]
HERE = "127.0.0.1"


def two_free_ports() -> int:
    """The first of them."""
    while True:
        port = rendezvous.free_port()
        try:
            return rendezvous.check_port(port + 1) - 1
        except LaunchError:
            continue


def write_config(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(f"run_dir: {folder}\nsteps: 100\nmodel: {{path: {folder}}}\ndata: {{train: [x.jsonl]}}\n")
    return path


def node_info(node: int, **changes: Any) -> NodeInfo:
    config: Mapping[str, Any] = {"steps": 2, "objective.beta": 0.5}
    basic: dict[str, Any] = {"nodes": 2, "ranks": 1, "servers": 0, "config": config, "versions": {"torch": "2.13.0"}}
    return NodeInfo(node=node, name=f"host{node}", **{**basic, **changes})


async def come(node_info: NodeInfo, port: int, run_dir: Path, *, seconds: float = 20.0) -> LaunchPlan | LaunchError:
    """What one machine gets from the meeting."""
    async with AsyncExitStack() as stack:
        try:
            plan, _, _ = await rendezvous.rendezvous(
                node_info,
                HERE,
                port,
                run_dir=run_dir,
                servers=lambda address: [f"http://{address}:{n}" for n in range(node_info.servers)],
                seconds=seconds,
                stack=stack,
            )
        except LaunchError as error:
            return error
        return plan


def meet_all(
    *node_infos: NodeInfo, folders: Mapping[int, Path], seconds: float = 20.0
) -> list[LaunchPlan | LaunchError]:
    async def all_of_them() -> list[LaunchPlan | LaunchError]:
        port = two_free_ports()
        return await asyncio.gather(*(come(one, port, folders[one.node], seconds=seconds) for one in node_infos))

    return asyncio.run(all_of_them())


def test_machines_that_mean_the_same_run_get_one_plan(tmp_path: Path) -> None:
    node_infos = [node_info(node, nodes=3, ranks=(2, 0, 2)[node], servers=(0, 2, 1)[node]) for node in (1, 0, 2)]
    plans = meet_all(*node_infos, folders=dict.fromkeys(range(3), tmp_path / "run"))
    assert plans[0] == plans[1] == plans[2]
    assert isinstance(plans[0], LaunchPlan)
    assert plans[0].trainers == (0, 2)
    assert plans[0].urls == (f"http://{HERE}:0", f"http://{HERE}:1", f"http://{HERE}:0")
    assert plans[0].machines == {0: "machine 0 (host0)", 1: "machine 1 (host1)", 2: "machine 2 (host2)"}
    assert not list((tmp_path / "run").iterdir()), "the file that they looked for is left"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"steps": 2, "objective.beta": 0.25}}, "arguments of machine 0 (host0) and machine 1 (host1): "),
        ({"config": {"steps": 2, "objective.beta": 0.25}}, "found objective.beta 0.5 and 0.25, expected the same"),
        ({"versions": {"torch": "2.14.0"}}, "found torch '2.13.0' and '2.14.0', expected the same"),
        ({"ranks": 2}, "RANKS_PER_NODE: found 2 on machine 1 (host1), 1 on machine 0 (host0)"),
        ({"nodes": 4}, "NODE_RANK: found machine 1 (host1) of 4, expected 2 machines"),
    ],
)
def test_machines_that_differ_are_refused_on_both_sides(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    found = meet_all(node_info(0), node_info(1, **changes), folders=dict.fromkeys(range(2), tmp_path))
    assert str(found[0]) == str(found[1])
    assert message in str(found[0])


def test_a_run_dir_of_each_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "VISIBLE_SECONDS", 0.1)
    folders = {0: tmp_path / "a", 1: tmp_path / "b"}
    found = meet_all(node_info(0), node_info(1), folders=folders)
    assert str(found[0]) == str(found[1])
    assert "run_dir: found a folder of machine 1 (host1) alone" in str(found[0])
    with_servers_alone = node_info(1, ranks=0, servers=1)
    assert all(isinstance(plan, LaunchPlan) for plan in meet_all(node_info(0), with_servers_alone, folders=folders))


def test_a_machine_that_does_not_come_is_named(tmp_path: Path) -> None:
    folders = dict.fromkeys(range(3), tmp_path)
    found = meet_all(node_info(0, nodes=3), node_info(2, nodes=3), folders=folders, seconds=1.0)
    assert "found machine 0 (host0), machine 2 (host2), expected machines 1 as well" in str(found[0])
    assert str(found[0]) == str(found[1])


def test_a_machine_0_that_does_not_answer_is_named(tmp_path: Path) -> None:
    port = two_free_ports()
    found = asyncio.run(come(node_info(1), port, tmp_path, seconds=0.6))
    assert f"MASTER_ADDR: found no answer from {HERE} port {port + 1} in 0.6 s" in str(found)


def test_a_machine_that_ended_and_is_started_again_is_no_second_one(tmp_path: Path) -> None:
    async def scene() -> list[LaunchPlan | LaunchError]:
        port = two_free_ports()
        first = asyncio.create_task(come(node_info(0, nodes=3), port, tmp_path))
        connection = await rendezvous._connect(HERE, port + 1, 20.0)
        connection.send(**asdict(node_info(1, nodes=3)))
        await asyncio.sleep(0.2)
        await connection.close()
        await asyncio.sleep(0.2)
        others = [come(node_info(node, nodes=3), port, tmp_path) for node in (1, 2)]
        return [*await asyncio.gather(*others), await first]

    plans = asyncio.run(scene())
    assert isinstance(plans[0], LaunchPlan), plans[0]
    assert plans[0] == plans[1] == plans[2]


def test_a_free_port_is_none_that_an_outgoing_connection_may_get() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(rendezvous.free_port() < lowest for _ in range(20))


@pytest.mark.parametrize("which", [0, 1])
def test_a_port_in_use_is_named(tmp_path: Path, which: int) -> None:
    port = two_free_ports()
    with socket.create_server(("", port + which)):
        found = asyncio.run(come(node_info(0), port, tmp_path, seconds=5.0))
    assert f"MASTER_PORT: found port {port + which} of this machine in use" in str(found)


def test_an_unknown_address_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"MASTER_ADDR: found no\.such\.host\.invalid"):
        rendezvous.resolve("no.such.host.invalid", 29500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"node": 2}, "NODE_RANK: found 2"), ({"ranks": 0, "servers": 0}, "RANKS_PER_NODE: found neither")],
)
def test_a_place_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    node_config: dict[str, Any] = {"nodes": 2, "node": 1, "ranks": 1, "servers": 0, "address": HERE, "port": 1}
    with pytest.raises(LaunchError, match=message):
        NodeConfig(**{**node_config, **changes}, meet_seconds=1, lost_seconds=1)


def test_servers_of_both_kinds_are_refused(tmp_path: Path) -> None:
    node_config = NodeConfig(nodes=1, node=0, ranks=1, servers=1, address=HERE, port=0, meet_seconds=1, lost_seconds=1)
    with pytest.raises(Exception, match=r"rollout\.sglang\.urls: found .* expected none with SERVERS_PER_NODE"):
        Machine(node_config, write_config(tmp_path), ["rollout.sglang.urls=[http://10.0.0.2:30000]"])


@pytest.mark.parametrize(("node", "left"), [(0, "75\n"), (1, None)])
def test_machine_0_leaves_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: int, left: str | None
) -> None:
    async def run(machine: Machine) -> int:
        return 75

    monkeypatch.setattr(Machine, "run", run)
    arguments = (
        f"--nodes 2 --node {node} --ranks 1 --servers 0 --address {HERE} --port 1 --meet-seconds 1 --lost-seconds 1"
    )
    path = tmp_path / "code"
    assert entry.main([*arguments.split(), "--code-file", str(path), str(write_config(tmp_path))]) == 75
    assert (path.read_text() if path.exists() else None) == left
    assert entry.main([*arguments.split(), "--code-file", str(path), str(tmp_path / "missing.yaml")]) == 2
    assert (path.read_text() if path.exists() else None) == (left and "2\n")


def test_where_a_branch_starts_reaches_the_ranks_and_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Machine] = []

    async def run(machine: Machine) -> int:
        started.append(machine)
        return 0

    monkeypatch.setattr(Machine, "run", run)
    arguments = f"--nodes 1 --node 0 --ranks 1 --servers 0 --address {HERE} --port 1 --meet-seconds 1 --lost-seconds 1"
    config = str(write_config(tmp_path))
    assert entry.main([*arguments.split(), config, "seed=3", "--branch-from", "runs/a@2", "--new-reference"]) == 0
    (machine,) = started
    assert machine._arguments == [config, "seed=3", "--branch-from", "runs/a@2", "--new-reference"]
    found = _node_info(machine._node_config, machine._config, machine._options).config
    assert found["command line"] == "--branch-from runs/a@2 --new-reference"


def test_a_place_that_cannot_be_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--nodes 2 --node 2 --ranks 1 --servers 0 --address {HERE} --port 1 --meet-seconds 1 --lost-seconds 1"
    assert entry.main([*arguments.split(), str(write_config(tmp_path))]) == 2
    assert capsys.readouterr().err.startswith("LaunchError: NODE_RANK: found 2")


# --- while the run goes on


async def liveness_of_all(nodes: int, lost_seconds: float, stack: AsyncExitStack) -> list[Liveness]:
    """As the machines have them after the meeting, all with ranks."""
    arrived: asyncio.Queue[Connection] = asyncio.Queue()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await arrived.put(Connection(reader, writer))

    server = await asyncio.start_server(greet, HERE, 0)
    stack.callback(server.close)
    plan = LaunchPlan("run", {node: f"machine {node}" for node in range(nodes)}, tuple(range(nodes)), ())
    ends, others = {}, []
    for node in range(1, nodes):
        others.append(Connection(*await asyncio.open_connection(*server.sockets[0].getsockname())))
        ends[node] = await arrived.get()
    made = [Liveness(0, plan, ends, lost_seconds)]
    made += [Liveness(node, plan, {0: connection}, lost_seconds) for node, connection in enumerate(others, start=1)]
    for one in made:
        one.start()
        stack.push_async_callback(one.close)
    return made


async def soon(what: Any, seconds: float = 20.0) -> Any:
    """What a function returns, once it is anything but None or False."""
    deadline = time.monotonic() + seconds
    while (found := what()) in (None, False):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    return found


def test_a_machine_that_fails_ends_the_others_by_way_of_machine_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "FAILED_GRACE", 0.1)

    async def scene() -> None:
        async with AsyncExitStack() as stack:
            first, second, third = await liveness_of_all(3, 60.0, stack)
            third.end(2)
            assert await soon(first.abort_reason) == ("machine 2 ended with exit code 2", 1)
            assert await soon(second.abort_reason) == ("machine 2 ended with exit code 2", 1)
            assert first.trainers_code() == 2

    asyncio.run(scene())


def test_all_hear_of_a_silent_machine_and_at_once_of_one_that_hangs_up() -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            first, second, third = await liveness_of_all(3, 0.5, stack)
            third.lost_seconds = 60.0
            assert first.abort_reason() is None
            await second.close()  # gives no signs of life any more, and reads none
            why, code = await soon(first.abort_reason)
            assert why.startswith("machine 1 has sent no heartbeat for")
            assert code == 1
            assert await soon(third.abort_reason) == (why, code), "by way of machine 0"
        async with AsyncExitStack() as stack:
            first, second, third = await liveness_of_all(3, 60.0, stack)
            await second.connections[0].close()
            for one in (first, third):
                assert "machine 1 closed its connection" in (await soon(one.abort_reason))[0]

    asyncio.run(scene())


def test_machines_that_stop_together_have_no_quarrel() -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            first, second = await liveness_of_all(2, 60.0, stack)
            second.stop(15)
            await soon(lambda: first.stop_signal == 15)
            first.end(75)
            assert await soon(lambda: second.ended.get(0)) == 75
            assert second.abort_reason() is None
            second.end(75)
            await soon(lambda: first.complete)
            assert (first.trainers_code(), second.trainers_code()) == (75, 75)

    asyncio.run(scene())


# --- stopping


class SavingRanks:
    """As ranks are under `Interrupt`: the first signal has them save, the second ends them."""

    made: ClassVar[list[SavingRanks]] = []

    def __init__(self, *_: object, **__: object) -> None:
        self.signals: list[int] = []
        self.saved = float("inf")
        self.made.append(self)

    def poll(self) -> int | None:
        if len(self.signals) > 1:
            return 128 + self.signals[-1]
        return 75 if time.monotonic() > self.saved else None

    def signal(self, number: int) -> None:
        self.signals.append(number)
        self.saved = time.monotonic() + 2.0

    def kill(self) -> None:
        pass


@pytest.mark.parametrize(
    ("signalled", "code"),
    [((0, 1, 2), 75), ((2, 1, 0), 75), ((1, 1), 75), ((1, 0), 75), ((0, 0), 143), ((1, 0, 0), 143)],
)
def test_a_run_that_all_machines_ask_to_stop_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: Sequence[int], code: int
) -> None:
    """Slurm signals all launchers; here machine 0 has ranks, 1 and 2 have servers alone."""
    monkeypatch.setattr(machine, "TorchrunProcess", SavingRanks)
    monkeypatch.setattr(machine, "prepare", lambda *_, **__: Servers())
    monkeypatch.setattr(SavingRanks, "made", [])
    config, port = write_config(tmp_path), two_free_ports()
    before = signal.getsignal(signal.SIGHUP)

    async def scene() -> list[int]:
        places = [
            NodeConfig(
                nodes=3,
                node=node,
                ranks=int(node == 0),
                servers=int(node > 0),
                address=HERE,
                port=port,
                meet_seconds=20,
                lost_seconds=60,
            )
            for node in range(3)
        ]
        machines = [Machine(node_config, config, []) for node_config in places]
        tasks = [asyncio.create_task(one.run()) for one in machines]
        await soon(lambda: bool(SavingRanks.made) and all(one._liveness is not None for one in machines))
        os.kill(os.getpid(), signal.SIGHUP)  # the terminal is closed
        await asyncio.sleep(2 * machine.POLL_SECONDS)
        assert not SavingRanks.made[0].signals
        for node in signalled:
            machines[node]._on_signal(signal.SIGTERM, tasks[node])
            await asyncio.sleep(2 * machine.POLL_SECONDS)  # until machine 0 has passed it on
        return await asyncio.wait_for(asyncio.gather(*tasks), 20.0)

    try:
        assert asyncio.run(scene()) == [code] * 3
    finally:
        signal.signal(signal.SIGHUP, before)
    assert SavingRanks.made[0].signals == ([15] if code == 75 else [15, 15])


# --- the ranks


def test_a_signal_before_there_are_ranks_is_told_as_a_shell_does(tmp_path: Path) -> None:
    ranks = TorchrunProcess(
        [], node=0, nodes=1, ranks=1, address=HERE, port=1, run="run", logs=tmp_path, environment=dict(os.environ)
    )
    ranks.signal(signal.SIGTERM)
    assert asyncio.run(soon(ranks.poll)) == 143


def test_so_is_one_that_torchrun_has_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def caught(*_: object) -> None:
        raise torchrun.SignalException("", signal.SIGTERM)

    monkeypatch.setattr(torchrun, "end_with_parent", lambda _: None)
    monkeypatch.setattr(torchrun.run, "run", caught)
    assert torchrun.main(["1", "-m", "sdpg_megatron"]) == 143


@pytest.mark.parametrize(("code", "expected"), [(75, 75), (3, 3), ("$((128 + 9))", 137)])
def test_torchrun_ends_with_the_ranks_exit_code_and_shows_why(tmp_path: Path, code: object, expected: int) -> None:
    arguments = [
        sys.executable,
        "-m",
        "sdpg_megatron.launch.torchrun",
        str(os.getpid()),
        "--nnodes=1",
        "--node-rank=0",
    ]
    arguments += ["--nproc-per-node=2", "--rdzv-id=start", "--rdzv-backend=static", f"--master-addr={HERE}"]
    arguments += [f"--master-port={rendezvous.free_port()}", f"--log-dir={tmp_path}", "--redirects=3", "--tee=0:3"]
    program = f'echo "reason $RANK" >&2; sleep $((1 - RANK)); exit {code}'
    done = subprocess.run(
        [*arguments, "--no-python", "bash", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == expected, done.stderr
    assert ("launch: rank 1 ended with exit code" in done.stderr) == (expected != 75)
    assert ("reason 1" in done.stderr) == (expected != 75)
