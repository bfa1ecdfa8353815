"""Checks of this machine before a run starts servers or attaches to them."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import torch

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.config import RunConfig, SGLangConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.process.rank_environment import RankEnvironment
from sdpg_megatron.rollout.sglang.build import Keys, first_gpu
from sdpg_megatron.rollout.sglang.interpreter import (
    check_interpreter,
    check_nccl,
    check_server_reading,
    default_python,
    own_version,
)
from sdpg_megatron.rollout.sglang.server import hold_free_port, hold_port


def check_servers(config: RunConfig, environment: RankEnvironment) -> None:
    """Check the requirements of a run with servers on the machine of its first rank.

    Takes seconds, as the servers' interpreter imports transformers. GPUs are not counted if the number of ranks on this
    machine is unknown.

    Raises:
        ConfigError: a key's variable is not set, a host cannot be resolved, there are too few GPUs, weights could not
            be broadcast, or the servers' transformers reads another model from config.json.
        RolloutError: a port or host cannot be used, or the interpreter has no sglang.
    """
    sglang = config.rollout.sglang
    Keys.read(sglang)
    check_hosts(sglang)
    if sglang.urls:
        return
    if environment.world_size == 1 or environment.local_world_size is not None:
        check_devices(sglang, torch.cuda.device_count(), environment)
        check_group(sglang, torch.cuda.device_count(), environment)
    check_ports(sglang)
    check_python(sglang, config.model.path)


def check_python(sglang: SGLangConfig, folder: Path) -> None:
    """Check the interpreter of started servers: sglang, transformers, and for broadcasts NCCL; for errors see there."""
    if not sglang.urls:
        python = sglang.python or default_python()
        check_interpreter(python)
        check_server_reading(python, folder, read_architecture(folder))
        own = own_version()
        if sglang.transport == "broadcast" and own is not None and python != sys.executable:
            check_nccl(python, own)


def check_trainer(config: RunConfig, kind: str) -> None:
    """Check that the trainer can leave its GPUs' memory to colocated servers.

    Args:
        kind: the trainer's device, "cuda" or "cpu".

    Raises:
        ConfigError: it cannot.
    """
    sglang = config.rollout.sglang
    if sglang.colocated and kind == "cuda" and config.model.dtype == "float32":
        # The optimizer's parameters are then the model's, which the next publish needs.
        raise ConfigError("model.dtype", "float32", "bfloat16 where servers are colocated on GPUs", "use bfloat16")


def check_hosts(sglang: SGLangConfig) -> None:
    """Resolve every configured host. Raises `ConfigError`."""
    urls = [("urls", url) for url in sglang.urls] + [("router", sglang.router or "")]
    hosts = [(field, urlsplit(url).hostname) for field, url in urls] + [("address", sglang.address)]
    for field, host in hosts:
        if not host:
            continue
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            expected = f"a host that this machine can resolve ({error.strerror})"
            raise ConfigError(
                f"rollout.sglang.{field}", host, expected, "correct it, or write its IP address"
            ) from error


def check_ports(sglang: SGLangConfig) -> None:
    """Bind every port of started servers, or any free one. Raises `RolloutError`."""
    if not sglang.ports:
        hold_free_port(sglang.host).close()
    for port in sglang.ports:
        hold_port(sglang.host, port).close()


def check_devices(sglang: SGLangConfig, gpus: int, environment: RankEnvironment | None = None) -> None:
    """Check that this machine has enough GPUs for the started servers, unless it has none.

    Args:
        gpus: number of GPUs visible to this process.
        environment: source of the number of trainer ranks on this machine; None for this process's.

    Raises:
        ConfigError: there are too few.
    """
    if sglang.urls or not gpus:
        return
    first = first_gpu(sglang, environment or RankEnvironment.read())
    each = sglang.tensor * sglang.data
    if first + sglang.servers * each > gpus:
        found = f"{sglang.servers}, of {each} GPUs each, from GPU {first} on"
        fix = (
            "lower rollout.sglang.servers, tensor or data; start fewer ranks; let servers share the trainer's GPUs "
            "(rollout.sglang.colocated=true rollout.sglang.transport=shared); or start them elsewhere and name them in "
            "rollout.sglang.urls"
        )
        raise ConfigError("rollout.sglang.servers", found, f"no more than this machine's {gpus} GPUs hold", fix)


def check_group(sglang: SGLangConfig, gpus: int, environment: RankEnvironment | None = None) -> None:
    """Check that no started server shares the machine's first GPU with the rank that broadcasts weights.

    NCCL refuses two ranks of a group on one GPU ("Duplicate GPU detected"). Arguments and error as `check_devices`.
    """
    if sglang.urls or not gpus or sglang.transport != "broadcast":
        return
    if first_gpu(sglang, environment or RankEnvironment.read()) == 0:
        expected = "a GPU that no rank of the trainer has, where rollout.sglang.transport is broadcast"
        fix = "leave it out, or use rollout.sglang.transport=shared or disk; with shared, colocated=true spares memory"
        raise ConfigError("rollout.sglang.first_gpu", 0, expected, fix)
