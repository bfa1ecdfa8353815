"""What servers need of a machine is checked before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import RunConfig, SGLangConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.errors import ConfigError, RolloutError
from sdpg_megatron.process.rank_environment import RankEnvironment
from sdpg_megatron.rollout.sglang import preflight
from sdpg_megatron.rollout.sglang.preflight import (
    check_devices,
    check_group,
    check_hosts,
    check_ports,
    check_python,
    check_servers,
    check_trainer,
)

TREE: dict[str, Any] = {"run_dir": "x", "steps": 20, "model": {"path": "x"}, "data": {"train": ["x"]}}
ALONE = RankEnvironment()
EIGHT = RankEnvironment(rank=0, world_size=8, local_world_size=8, master_addr="x", master_port=1)


@pytest.mark.parametrize(
    ("changes", "environment", "gpus"),
    [
        ({}, ALONE, 2),
        ({"servers": 2, "tensor": 2}, RankEnvironment(local_world_size=4), 8),
        ({"servers": 8, "colocated": True, "transport": "shared"}, EIGHT, 8),
        ({"first_gpu": 0, "tensor": 8}, EIGHT, 8),
        ({"servers": 100}, ALONE, 0),
        ({"urls": ("http://10.0.0.2:1",), "servers": 100}, EIGHT, 8),
    ],
)
def test_gpus_that_are_enough(changes: dict[str, Any], environment: RankEnvironment, gpus: int) -> None:
    check_devices(SGLangConfig(**changes), gpus, environment)


@pytest.mark.parametrize(
    ("changes", "environment", "gpus", "found"),
    [
        ({}, ALONE, 1, "1, of 1 GPUs each, from GPU 1 on', expected no more than this machine's 1 GPUs"),
        ({}, EIGHT, 8, "1, of 1 GPUs each, from GPU 8 on"),
        ({"servers": 2, "tensor": 2, "data": 2, "transport": "disk"}, ALONE, 8, "2, of 4 GPUs each, from GPU 1 on"),
        ({"servers": 9, "colocated": True, "transport": "shared"}, EIGHT, 8, "9, of 1 GPUs each, from GPU 0 on"),
    ],
)
def test_too_few_gpus_are_named(changes: dict[str, Any], environment: RankEnvironment, gpus: int, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rollout\.sglang\.servers: found '{found}"):
        check_devices(SGLangConfig(**changes), gpus, environment)


def test_one_gpu_is_not_enough_for_a_server_beside_the_trainer() -> None:
    with pytest.raises(ConfigError, match=r"servers: .*colocated=true rollout\.sglang\.transport=shared"):
        check_devices(SGLangConfig(), 1, ALONE)
    alone = SGLangConfig(first_gpu=0)
    check_devices(alone, 1, ALONE)
    with pytest.raises(ConfigError, match=r"first_gpu: found 0, expected a GPU that no rank.*transport=shared or disk"):
        check_group(alone, 1, ALONE)
    for fits in (
        SGLangConfig(first_gpu=0, transport="shared"),
        SGLangConfig(colocated=True, transport="disk"),
        SGLangConfig(first_gpu=1),
        SGLangConfig(urls=("http://10.0.0.2:1",), first_gpu=0),
    ):
        check_group(fits, 2, ALONE)
    check_group(alone, 0, ALONE)  # on a CPU


@pytest.mark.parametrize(
    ("transport", "own", "theirs", "refused"),
    [
        ("broadcast", "2.28.9", "[2, 27, 5]", True),
        ("broadcast", "2.28.9", "[2, 28, 9]", False),
        ("broadcast", "2.28.9", "no CUDA", False),
        ("broadcast", None, "[2, 27, 5]", False),
        ("shared", "2.28.9", "[2, 27, 5]", False),
    ],
)
def test_trainer_and_servers_need_the_same_nccl_where_it_carries_weights(
    transport: str, own: str | None, theirs: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'a line of torch'\necho '{theirs}'\n")
    python.chmod(0o755)
    for name in ("check_interpreter", "check_server_reading", "read_architecture"):
        monkeypatch.setattr(preflight, name, lambda *given: None)
    monkeypatch.setattr(preflight, "own_version", lambda: own)
    sglang = config(transport=transport, python=str(python)).rollout.sglang
    if refused:
        with pytest.raises(
            ConfigError, match=rf"trainer's torch has 2\.28\.9, that of {python} has 2\.27\.5.*Fix: .*shared"
        ):
            check_python(sglang, tmp_path)
    else:
        check_python(sglang, tmp_path)


def test_the_number_of_ranks_on_this_machine_has_to_be_known() -> None:
    """As it is not where a shell or srun has started them: servers would take the trainer's devices."""
    unknown = RankEnvironment(rank=0, world_size=8, master_addr="x", master_port=1)
    with pytest.raises(ConfigError, match=r"first_gpu: found None.*LOCAL_WORLD_SIZE"):
        check_devices(SGLangConfig(), 8, unknown)


def test_colocated_servers_on_gpus_need_another_type_of_weights() -> None:
    served = config(colocated=True, transport="shared")
    check_trainer(served, "cpu")
    check_trainer(config(), "cuda")
    with pytest.raises(ConfigError, match=r"^model\.dtype: found 'float32', expected bfloat16 where servers are coloc"):
        check_trainer(served, "cuda")


def test_ports_that_are_taken_and_hosts_that_are_elsewhere_are_named() -> None:
    check_ports(SGLangConfig())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RolloutError, match=rf"port {port} of 127\.0\.0\.1 cannot be used .*rollout\.sglang\.ports"):
            check_ports(SGLangConfig(ports=(port,)))
    check_ports(SGLangConfig(ports=(port,)))
    for ports in ((), (port,)):
        with pytest.raises(RolloutError, match=r"192\.0\.2\.1.*\(Cannot assign requested address\)\. Fix: "):
            check_ports(SGLangConfig(host="192.0.2.1", ports=ports))
    with pytest.raises(RolloutError, match=r"nowhere\.invalid: not an address \([^\[]+\)\. Fix: "):
        check_ports(SGLangConfig(host="nowhere.invalid"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"urls": ("http://127.0.0.1:1", "http://nowhere.invalid:1")}, "urls"),
        ({"urls": ("http://127.0.0.1:1",), "router": "http://nowhere.invalid:1"}, "router"),
        ({"address": "nowhere.invalid"}, "address"),
    ],
)
def test_a_host_that_is_unknown_is_named(changes: dict[str, Any], field: str) -> None:
    check_hosts(SGLangConfig(urls=("http://localhost:1", "http://[::1]:1"), router="http://127.0.0.1:1"))
    with pytest.raises(ConfigError, match=rf"^rollout\.sglang\.{field}: found 'nowhere\.invalid', expected .*resolve"):
        check_hosts(SGLangConfig(**changes))


def config(**sglang: Any) -> RunConfig:
    rollout = {"engine": "sglang", "sglang": sglang}
    return parse({**TREE, "rollout": rollout})


def test_everything_is_checked_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="export SOME_KEY"):
        check_servers(config(api_key_variable="SOME_KEY"), ALONE)
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(RolloutError, match=r"has no sglang \(no such package\)"):
        check_servers(config(python=str(bare)), ALONE)
    with pytest.raises(RolloutError, match=r"does not run \(No such file or directory\)"):
        check_servers(config(python="/no/such/python"), ALONE)
    check_servers(config(python="/no/such/python", urls=["http://127.0.0.1:1"]), ALONE)
