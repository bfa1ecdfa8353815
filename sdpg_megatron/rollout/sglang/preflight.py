"""Checks of this machine before servers are started on it, or attached to. Nothing is started."""

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
from sdpg_megatron.rollout.sglang.nccl import check_nccl, own_version
from sdpg_megatron.rollout.sglang.server import check_interpreter, default_python, hold_free_port, hold_port
from sdpg_megatron.rollout.sglang.transformers_check import check_server_reading


def check_servers(config: RunConfig, environment: RankEnvironment) -> None:
    """Check all that a run with servers needs of this machine, which is that of its first rank.

    Takes seconds: the interpreter for the servers imports transformers. GPUs are not counted where the number of ranks
    on this machine is unknown.

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
    """Check that the interpreter for started servers has sglang, that its transformers reads a model's config.json, and
    that its NCCL is the trainer's where weights are broadcast over it.

    Raises:
        ConfigError: it reads another model than the trainer, or has another NCCL.
        RolloutError: it does not run, has no sglang, or cannot read the file.
    """
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
        kind: "cuda" or "cpu", where the trainer runs.

    Raises:
        ConfigError: it cannot.
    """
    sglang = config.rollout.sglang
    if sglang.colocated and kind == "cuda" and config.model.dtype == "float32":
        # The optimizer's parameters are then the model's own, which have to stay for the next publish.
        raise ConfigError("model.dtype", "float32", "bfloat16 where servers are colocated on GPUs", "use bfloat16")


def check_hosts(sglang: SGLangConfig) -> None:
    """Resolve every host that the configuration names. Raises `ConfigError`."""
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
    """Bind every port that started servers are to have, or any free one. Raises `RolloutError`."""
    if not sglang.ports:
        hold_free_port(sglang.host).close()
    for port in sglang.ports:
        hold_port(sglang.host, port).close()


def check_devices(sglang: SGLangConfig, gpus: int, environment: RankEnvironment | None = None) -> None:
    """Compare the GPUs that started servers take with those of this machine. Nothing on a machine without any.

    Args:
        gpus: that this process sees.
        environment: tells how many ranks of the trainer are on this machine; None for this process's own.

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
    """Check that no started server has the GPU of the rank that broadcasts weights, which is the machine's first.

    NCCL has no two ranks of a group on one GPU ("Duplicate GPU detected"). The arguments are those of `check_devices`.

    Raises:
        ConfigError: one has.
    """
    if sglang.urls or not gpus or sglang.transport != "broadcast":
        return
    if first_gpu(sglang, environment or RankEnvironment.read()) == 0:
        expected = "a GPU that no rank of the trainer has, where rollout.sglang.transport is broadcast"
        fix = "leave it out, or use rollout.sglang.transport=shared or disk; with shared, colocated=true spares memory"
        raise ConfigError("rollout.sglang.first_gpu", 0, expected, fix)
