"""Plan of a run: its memory, traffic and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdpg_megatron.architecture import (
    Architecture,
    check_lengths,
    check_model,
    check_parallel,
    check_served,
    read_architecture,
)
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.estimate.duration import durations
from sdpg_megatron.estimate.gpus import MACHINE, Gpu
from sdpg_megatron.estimate.load import Load
from sdpg_megatron.estimate.memory import ServerMemory, StageMemory, room, server_memory, stage_memory
from sdpg_megatron.estimate.shards import Grid
from sdpg_megatron.estimate.traffic import Flow, flows, server_gpus


@dataclass(frozen=True, slots=True)
class Plan:
    config: RunConfig
    arch: Architecture
    gpu: Gpu
    grid: Grid
    load: Load
    stages: Sequence[StageMemory]
    server: ServerMemory | None
    """One GPU of a rollout server; None for the embedded engine."""
    traffic: Mapping[str, Flow]
    seconds: Mapping[str, float]

    @property
    def fullest(self) -> StageMemory:
        """Pipeline stage with the largest memory per rank."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def over(self) -> float:
        """Bytes missing on the fullest rank; negative if it has some left."""
        return self.fullest.peak - room(self.gpu.memory)

    @property
    def fits(self) -> bool:
        return self.over <= 0 and self.served

    @property
    def served(self) -> bool:
        """True if a server has memory for at least one sequence."""
        return self.server is None or self.server.sequences > 0

    @property
    def server_gpus(self) -> int:
        """Number of GPUs of the run's servers in addition to the trainer's."""
        return server_gpus(self.config)


def make_plan(config: RunConfig, gpu: Gpu, ranks: int | None = None) -> Plan:
    """Plan a run from its configuration and its model's config.json.

    Args:
        ranks: trainer ranks; None for the fewest that the layout allows.

    Raises:
        ConfigError: the configuration is invalid for this model or number of ranks, or colocated servers need more
            GPUs than the trainer has on a machine.
    """
    arch = read_architecture(config.model.path)
    check_lengths(arch, config)
    # The run itself checks that apex is installed.
    model = config.model.model_copy(update={"gradient_accumulation_fusion": False})
    check_model(arch, model, replay_routing=config.rollout.replay_routing)
    check_parallel(arch, config.parallel)
    grid = Grid.of(config.parallel, ranks)
    _check_servers(arch, config, grid.world)
    load = Load.of(config, grid.data)
    stages = [stage_memory(arch, config, grid, load, stage, gpu.memory) for stage in range(grid.pipeline)]
    server = None
    if config.rollout.engine == "sglang":
        trainer = max(stage.weights for stage in stages) if config.rollout.sglang.colocated else 0
        server = server_memory(arch, config, gpu.memory, trainer)
    traffic = flows(arch, config, grid, load, stages)
    seconds = durations(arch, config, grid, load, gpu, traffic, server)
    return Plan(config, arch, gpu, grid, load, stages, server, traffic, seconds)


def _check_servers(arch: Architecture, config: RunConfig, world: int) -> None:
    """Check the servers that the run starts. Raises `ConfigError`."""
    served = config.rollout.sglang
    if config.rollout.engine != "sglang" or served.urls:
        return
    check_served(arch, served)
    devices, there = served.servers * served.tensor * served.data, min(world, MACHINE)
    if served.colocated and devices > there:
        found = f"{served.servers} x {served.tensor} x {served.data}"
        expected = f"at most the {there} GPUs of the trainer on its first machine, which runs colocated servers"
        fix = "have fewer or smaller servers, or name more with --ranks"
        raise ConfigError("rollout.sglang: servers x tensor x data", found, expected, fix)
