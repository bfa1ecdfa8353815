"""The rollout servers that a machine's launcher starts, keeps running, and ends."""

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
"""Servers of a machine, at most: machine n's seeds begin at so many times n."""
ANY = "127.0.0.1"
"""`rollout.sglang.host` where nobody has set it."""


class Servers:
    """Those of this machine; none where `processes` is empty."""

    def __init__(self, processes: Sequence[ServerProcess] = (), restarts: int = 0) -> None:
        """
        Args:
            restarts: times that servers are started anew, all together.
        """
        self._processes, self._restarts = tuple(processes), restarts

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(process.url for process in self._processes)

    def start(self) -> None:
        """Return without waiting until they answer: the trainer does. Raises `RolloutError`."""
        for process in self._processes:
            process.start()

    def look(self) -> None:
        """Start anew what has ended.

        Raises:
            LaunchError: it has too often.
        """
        for process in self._processes:
            if process.alive():
                continue
            if not self._restarts:
                found = f"{process.url}, which ended again; its log ends with:\n{process.log_tail()}\n"
                fix = "see the log; or raise rollout.sglang.restarts"
                raise LaunchError("rollout server", found, "one that stays", fix)
            self._restarts -= 1
            sys.stderr.write(f"launch: the server {process.url} ended; it is started anew\n")
            process.start()

    def close(self) -> None:
        """End them and all that they started."""
        with ThreadPoolExecutor(max(1, len(self._processes))) as threads:
            list(threads.map(lambda process: process.stop(), self._processes))


def prepare(config: RunConfig, *, count: int, node: int, ranks: int, address: str) -> Servers:
    """`count` servers as the run's configuration has them, not yet started.

    Args:
        node: this machine's number.
        ranks: on this machine; the servers' GPUs come after theirs, unless `rollout.sglang.first_gpu` says otherwise.
        address: this machine's, as the others reach it.

    Raises:
        ConfigError: the configuration, the model or the keys do not fit.
        RolloutError: there is no port, or the interpreter for servers has no sglang or cannot read config.json.
    """
    if not count:
        return Servers()
    import torch  # takes seconds, as does what the next lines import: only where there are servers

    from sdpg_megatron.rollout.sglang.build import Keys, make_processes
    from sdpg_megatron.rollout.sglang.preflight import check_devices, check_python
    from sdpg_megatron.train.engines import served_model
    from sdpg_megatron.train.inputs import load_model_inputs

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sglang = config.rollout.sglang
    if sglang.ports and len(sglang.ports) != count:
        raise ConfigError("rollout.sglang.ports", sglang.ports, f"{count} of them", "name as many, or none")
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
