"""Rollout servers that a machine's launcher starts, restarts and stops."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from sdpg_megatron.rollout.sglang.server import ServerProcess

SEEDS = 1000
"""Seed stride between machines, and so the most servers of a machine."""
ANY = "127.0.0.1"
"""Default of `rollout.sglang.host`."""


class Servers:
    """Rollout servers of this machine; may be empty."""

    def __init__(self, processes: Sequence[ServerProcess] = (), restarts: int = 0) -> None:
        """
        Args:
            restarts: bound of restarts, counted over all servers.
        """
        self._processes, self._restarts = tuple(processes), restarts

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(process.url for process in self._processes)

    def start(self) -> None:
        """Start the servers without waiting for them: the trainer waits. Raises `RolloutError`."""
        for process in self._processes:
            process.start()

    def restart_ended(self) -> None:
        """Restart servers that have ended.

        Raises:
            LaunchError: no restarts are left.
        """
        for process in self._processes:
            if process.alive():
                continue
            if not self._restarts:
                found = f"{process.url}, which ended again; its log ends with:\n{process.log_tail()}\n"
                fix = "see the log; or raise rollout.sglang.restarts"
                raise LaunchError("rollout server", found, "a running server", fix)
            self._restarts -= 1
            sys.stderr.write(f"launch: the server {process.url} ended; restarting it\n")
            process.start()

    def close(self) -> None:
        """Stop the servers with their child processes."""
        with ThreadPoolExecutor(max(1, len(self._processes))) as threads:
            list(threads.map(lambda process: process.stop(), self._processes))


def prepare(config: RunConfig, *, count: int, node: int, ranks: int, address: str) -> Servers:
    """Prepare `count` servers of the run's configuration, without starting them.

    Args:
        node: number of this machine.
        ranks: ranks on this machine; the servers' GPUs follow theirs, unless `rollout.sglang.first_gpu` is set.
        address: address of this machine, as the others reach it.

    Raises:
        ConfigError: the configuration, the model or the keys do not fit.
        RolloutError: no port is free, or the servers' interpreter has no sglang or cannot read config.json.
    """
    if not count:
        return Servers()
    import torch  # slow, as are the next imports: only on machines with servers

    from sdpg_megatron.rollout.sglang.build import Keys, make_processes
    from sdpg_megatron.rollout.sglang.preflight import check_devices, check_python
    from sdpg_megatron.train.engines import served_model
    from sdpg_megatron.train.inputs import load_model_inputs

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sglang = config.rollout.sglang
    if sglang.ports and len(sglang.ports) != count:
        raise ConfigError("rollout.sglang.ports", sglang.ports, f"{count} ports", "name one per server, or none")
    sglang = sglang.model_copy(
        update={
            "servers": count,
            "host": address if sglang.host == ANY else sglang.host,
            "first_gpu": ranks if sglang.first_gpu is None else sglang.first_gpu,
        }
    )
    check_devices(sglang, torch.cuda.device_count())
    check_python(sglang, config.model.path)
    model = served_model(config, load_model_inputs(config), "cuda" if torch.cuda.is_available() else "cpu")
    seed, name = config.seed + SEEDS * node, f"sglang-{node}"
    processes = make_processes(sglang, model, Keys.read(sglang), run_dir=config.run_dir, seed=seed, name=name)
    return Servers(processes, sglang.restarts)
