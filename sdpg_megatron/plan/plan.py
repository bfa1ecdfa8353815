"""A run's plan: what it needs, and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdpg_megatron.architecture import (
    Architecture,
    check_lengths,
    check_model,
    check_parallel,
    read_architecture,
)
from sdpg_megatron.config import RunConfig
from sdpg_megatron.plan.duration import durations
from sdpg_megatron.plan.gpus import Gpu
from sdpg_megatron.plan.load import Load
from sdpg_megatron.plan.memory import ServerMemory, StageMemory, room, server_memory, stage_memory
from sdpg_megatron.plan.shards import Grid
from sdpg_megatron.plan.traffic import Flow, flows


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
        """The pipeline stage whose ranks need most."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def over(self) -> float:
        """Bytes that the fullest rank lacks; negative where some are left."""
        return self.fullest.peak - room(self.gpu.memory)

    @property
    def fits(self) -> bool:
        return self.over <= 0 and self.served

    @property
    def served(self) -> bool:
        """A server has room for one sequence at least."""
        return self.server is None or self.server.sequences > 0

    @property
    def server_gpus(self) -> int:
        """That servers which the run starts take beside the trainer's."""
        served = self.config.rollout.sglang
        if self.server is None or served.colocated or served.urls:
            return 0
        return served.servers * served.tensor * served.data


def make_plan(config: RunConfig, gpu: Gpu, ranks: int | None = None) -> Plan:
    """Plan a run from its configuration and its model's config.json.

    Args:
        ranks: of the trainer; None for the fewest that the layout allows.

    Raises:
        ConfigError: the configuration cannot work with this model, or with this number of ranks.
    """
    arch = read_architecture(config.model.path)
    check_lengths(arch, config)
    # Whether apex is installed is asked where the run is.
    model = config.model.model_copy(update={"gradient_accumulation_fusion": False})
    check_model(arch, model, replay_routing=config.rollout.replay_routing)
    check_parallel(arch, config.parallel)
    grid = Grid.of(config.parallel, ranks)
    load = Load.of(config, grid.data)
    stages = [stage_memory(arch, config, grid, load, stage, gpu.memory) for stage in range(grid.pipeline)]
    server = None
    if config.rollout.engine == "sglang":
        trainer = max(stage.weights for stage in stages) if config.rollout.sglang.colocated else 0
        server = server_memory(arch, config, gpu.memory, trainer)
    traffic = flows(arch, config, grid, load, max(stages, key=lambda stage: stage.numel))
    seconds = durations(arch, config, grid, load, gpu, traffic, server)
    return Plan(config, arch, gpu, grid, load, stages, server, traffic, seconds)
