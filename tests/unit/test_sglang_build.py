"""From a configuration to servers, and what these get of the environment."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.rollout.sglang.build import Keys, ServedModel, make_processes, make_transport
from sdpg_megatron.rollout.sglang.client import Client
from sdpg_megatron.rollout.sglang.server import Launch, environment
from tests.sglang_fakes import Misbehaving, good


@pytest.mark.parametrize(
    ("changes", "trainer_ranks", "devices"),
    [
        ({}, None, [1, 3]),
        ({}, "4", [4, 6]),
        ({"data": 2, "transport": "disk"}, "1", [1, 5]),
        ({"colocated": True, "transport": "shared"}, "4", [0, 2]),
        ({"first_gpu": 6}, "4", [6, 8]),
    ],
)
def test_no_two_started_servers_share_a_device(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    trainer_ranks: str | None,
    devices: list[int],
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if trainer_ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", trainer_ranks)
    model = ServedModel(
        folder=tmp_path,
        tokenizer=None,
        stop_ids=(1,),
        dtype="bfloat16",
        device="cuda",
        prompt_tokens=8,
        response_tokens=8,
    )
    config = SGLangConfig(servers=2, tensor=2, **changes)
    processes = make_processes(config, model, Keys(None, None), run_dir=tmp_path, seed=0)
    assert [process.launch.base_gpu for process in processes] == devices
    assert len({process.launch.seed for process in processes}) == 2
    for process in processes:
        process.stop()  # it holds a port


PROXIES = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), "http://10.9.9.9:3128")


def server_environment(base: dict[str, str], host: str = "10.0.0.2") -> dict[str, str]:
    launch = Launch(model=Path("m"), log=Path("log"), host=host, dtype="float32", device="cpu", python="python")
    return environment(launch, base)


@pytest.mark.parametrize(
    "users",
    [{}, {"no_proxy": "corp.example, 10.1.0.0/16"}, {"NO_PROXY": "corp.example,10.1.0.0/16"}, {"no_proxy": ""}],
)
def test_a_server_reaches_the_runs_hosts_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, users: dict[str, str]
) -> None:
    found = server_environment({**PROXIES, **users, "MASTER_ADDR": "node-0"})
    assert {name: found[name] for name in PROXIES} == PROXIES, "other hosts still go through it"
    assert found["no_proxy"] == found["NO_PROXY"]
    assert set(users.get("no_proxy", users.get("NO_PROXY", "")).replace(" ", "").split(",")) - {""} <= set(
        found["no_proxy"].split(",")
    )
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, found[name])
    direct = ("127.0.0.1:30000", "localhost:30000", "10.0.0.2:30000", "node-0")
    assert all(urllib.request.proxy_bypass_environment(host) for host in direct)  # type: ignore[attr-defined]
    assert not urllib.request.proxy_bypass_environment("huggingface.co")  # type: ignore[attr-defined]


def test_the_trainers_variables_do_not_reach_a_server() -> None:
    allocator = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True")
    found = server_environment({**allocator, "PYTHONPATH": "/trainer", "RANK": "0", "HF_HOME": "/hub"})
    assert not {*allocator, "PYTHONPATH", "RANK"} & set(found)
    assert found["HF_HOME"] == "/hub"
    same = Launch(model=Path("m"), log=Path("log"), host="h", dtype="float32", device="cpu", python=sys.executable)
    assert environment(same, {"PYTHONPATH": "/packages"})["PYTHONPATH"] == "/packages"


def test_a_wildcard_stays_alone() -> None:
    """Programs take it for one only then."""
    assert server_environment({"NO_PROXY": "*", "no_proxy": "corp.example"})["no_proxy"] == "*"


def test_requests_to_servers_go_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def ask() -> None:
        async with Misbehaving(good).started() as server:
            client = Client(server.url)
            assert await client.alive() and await client.weight_version()
            await client.close()

    asyncio.run(ask())


TRANSPORT = """
from sdpg_megatron.rollout.transports import DiskTransport
class Mine(DiskTransport):
    def __init__(self, config, source_folder, run_dir):
        super().__init__(folder=run_dir / "mine", source_folder=source_folder, shard_bytes=config.bucket_mib << 20)
class Incomplete:
    in_session = False
"""


def test_a_transport_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_transport.py").write_text(TRANSPORT)
    monkeypatch.syspath_prepend(tmp_path)
    model: Any = type("Model", (), {"folder": tmp_path / "model", "device": "cpu"})

    def make(name: str) -> Any:
        config = SGLangConfig(transport=f"own_transport:{name}")
        return make_transport(config, model, run_dir=tmp_path, nonce="")

    assert make("Mine")._folder == tmp_path / "mine"
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.transport: .*lacks open, allocate, pack"):
        make("Incomplete")
