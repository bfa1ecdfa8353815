"""Build an engine's parts from a configuration: processes, pool, transport."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.config.external import load_object
from sdpg_megatron.errors import ConfigError, RolloutError
from sdpg_megatron.process.rank_environment import RankEnvironment
from sdpg_megatron.rollout.sglang.client import Client, Timeouts
from sdpg_megatron.rollout.sglang.interpreter import default_python
from sdpg_megatron.rollout.sglang.pool import Pool
from sdpg_megatron.rollout.sglang.requirements import ServerRequirements
from sdpg_megatron.rollout.sglang.server import Launch, ServerProcess
from sdpg_megatron.rollout.sglang.server_handle import ServerHandle
from sdpg_megatron.rollout.transports import BroadcastTransport, DiskTransport, SharedMemoryTransport, Transport

CONTROL_SECONDS = 60.0
"""Time limit of short calls to a server."""
PUBLISH_FOLDER = "published"
"""Folder of the disk transport, in the run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model on the servers and the run's requirements."""

    folder: Path
    """Hugging Face folder. Servers start with its weights, but serve only after the first publish."""
    tokenizer: Any
    """transformers tokenizer; decodes responses."""
    stop_ids: tuple[int, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    prompt_tokens: int
    """Longest prompt."""
    response_tokens: int
    """Longest response."""
    experts: bool = False
    """Started servers return the experts that each token was routed to."""


@dataclass(frozen=True, slots=True)
class Keys:
    """API keys of the servers, read from the environment and never written."""

    api: str | None = field(repr=False)
    admin: str | None = field(repr=False)

    @classmethod
    def read(cls, config: SGLangConfig) -> Keys:
        """Raises `ConfigError` if a configured variable is not set."""
        return cls(
            _secret("api_key_variable", config.api_key_variable),
            _secret("admin_key_variable", config.admin_key_variable),
        )


def _secret(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(
            f"rollout.sglang.{name}", variable, "an environment variable that holds the key", f"export {variable}"
        )
    return os.environ[variable]


def make_processes(
    config: SGLangConfig, model: ServedModel, keys: Keys, *, run_dir: Path, seed: int, name: str = "sglang"
) -> list[ServerProcess]:
    """Make the run's own servers without starting them.

    Args:
        seed: different from the seeds on the run's other machines.
        name: prefix of their logs.

    Raises:
        RolloutError: `host` is not an address of this machine, or there is no port.
    """
    common = Launch(
        model=model.folder,
        log=run_dir,
        host=config.host,
        tensor=config.tensor,
        data=config.data,
        dtype=config.dtype or model.dtype,
        device=model.device,
        mem_fraction=config.mem_fraction,
        memory_saver=config.colocated,
        experts=model.experts,
        python=config.python or default_python(),
        arguments=config.arguments,
        api_key=keys.api,
        admin_key=keys.admin,
    )
    ports = config.ports or (None,) * config.servers
    first = first_gpu(config, RankEnvironment.read())
    return [
        ServerProcess(
            replace(
                common,
                log=run_dir / "logs" / f"{name}-{number}.log",
                port=port,
                seed=(seed + number) % 2**32,  # 32 bits for NumPy; equal seeds would give equal responses
                base_gpu=first + number * config.tensor * config.data,
            )
        )
        for number, port in enumerate(ports)
    ]


def first_gpu(config: SGLangConfig, environment: RankEnvironment) -> int:
    """Device number of the first started server, after the trainer's ranks by default. Raises `ConfigError` if the
    number of the trainer's ranks on this machine is unknown."""
    if config.first_gpu is not None:
        return config.first_gpu
    if config.colocated:
        return 0
    ranks_here = environment.local_world_size or (1 if environment.world_size == 1 else None)
    if ranks_here is None:
        expected = "a device number where LOCAL_WORLD_SIZE, the number of ranks on this machine, is not set"
        raise ConfigError("rollout.sglang.first_gpu", None, expected, "set it, or export LOCAL_WORLD_SIZE")
    return ranks_here


async def make_pool(
    config: SGLangConfig, model: ServedModel, keys: Keys, processes: Sequence[ServerProcess], *, publishes: bool
) -> Pool:
    """Make a pool of these processes, or of the servers at `config.urls`; run in the pool's event loop."""
    wanted = ServerRequirements(
        architecture=read_architecture(model.folder),
        prompt_tokens=model.prompt_tokens,
        response_tokens=model.response_tokens,
        memory_saver=config.colocated,
    )
    places: list[tuple[str, ServerProcess | None]] = [(process.url, process) for process in processes]
    handles = [
        ServerHandle(url, _make_client(url, config, keys, process), process)
        for url, process in places or [(url, None) for url in config.urls]
    ]
    return Pool(handles, config, publishes=publishes, check=wanted.check)


async def make_router(config: SGLangConfig, keys: Keys) -> Client | None:
    """Make a client of the configured router, if any; run in its event loop. Raises `RolloutError` if the router does
    not answer."""
    if config.router is None:
        return None
    client = _make_client(config.router, config, keys)
    if not await client.alive():
        await client.close()
        raise RolloutError(f"{config.router}: no router answers. Fix: start it, or unset rollout.sglang.router")
    return client


def _make_client(url: str, config: SGLangConfig, keys: Keys, process: ServerProcess | None = None) -> Client:
    timeouts = Timeouts(
        control=CONTROL_SECONDS,
        update=config.update_timeout,
        generate=config.request_timeout,
        health=config.health_timeout,
    )
    starts = None if process is None else lambda: process.starts
    return Client(url, api_key=keys.api, admin_key=keys.admin, timeouts=timeouts, starts=starts)


def make_transport(config: SGLangConfig, model: ServedModel, *, run_dir: Path, nonce: str) -> Transport:
    match config.transport:
        case "broadcast":
            # With its index: the transport's threads have another current device.
            on_gpu = model.device == "cuda"
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
            return BroadcastTransport(nonce=nonce, device=device, address=config.address, seconds=config.update_timeout)
        case "shared":
            return SharedMemoryTransport()
        case "disk":
            folder = config.folder or run_dir / PUBLISH_FOLDER
            return DiskTransport(folder=folder, source_folder=model.folder, shard_bytes=config.bucket_mib << 20)
        case external:
            return _external_transport(external, config, model.folder, run_dir)


def _external_transport(spec: str, config: SGLangConfig, source_folder: Path, run_dir: Path) -> Transport:
    """Build a transport of the user's, as ``Class(config, source_folder, run_dir)``. Raises `ConfigError`."""
    kind = load_object("rollout.sglang.transport", spec)
    needed = ("in_session", "open", "allocate", "pack", "finish", "close", "dispose")
    if missing := [name for name in needed if not hasattr(kind, name)]:
        expected = f"a class with the members of sdpg_megatron.Transport (it lacks {', '.join(missing)})"
        raise ConfigError("rollout.sglang.transport", spec, expected, "add them")
    transport: Transport = kind(config, source_folder, run_dir)
    return transport
