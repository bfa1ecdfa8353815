"""Process groups, and this rank's position in them."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _set_pg_timeout

from sdpg_megatron.config import ParallelConfig
from sdpg_megatron.errors import ConfigError, LaunchError
from sdpg_megatron.mcore.compat import device
from sdpg_megatron.mcore.rendezvous import rendezvous
from sdpg_megatron.process.rank_environment import RankEnvironment

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ParallelState:
    """This rank's coordinates, sizes and groups in the tensor x pipeline x context x data grid, and among expert ranks.

    A replica is the set of ranks that together hold one copy of the model: tensor x pipeline, times the context- and
    data-parallel ranks over which its experts are sharded.
    """

    world: int
    rank: int
    tensor: int
    tensor_size: int
    tensor_group: ProcessGroup
    pipeline: int
    pipeline_size: int
    pipeline_group: ProcessGroup
    context: int
    context_size: int
    context_group: ProcessGroup
    data: int
    data_size: int
    expert: int
    expert_size: int
    expert_tensor: int
    expert_tensor_size: int
    expert_group: ProcessGroup
    """Ranks of the stage that hold one copy of its experts; the ranks that shard an expert are adjacent."""

    @property
    def _copy(self) -> int:
        """Index over context- and data-parallel ranks, which have the same weights except experts."""
        return self.data * self.context_size + self.context

    @property
    def _copies_of_replica(self) -> int:
        """Number of `_copy` indices in a replica."""
        return max(1, self.expert_group.size() // self.tensor_size)

    @property
    def replica(self) -> int:
        return self._copy // self._copies_of_replica

    @property
    def replicas(self) -> int:
        return self.data_size * self.context_size // self._copies_of_replica

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and logs."""
        return self.rank == 0

    @property
    def leads_replica(self) -> bool:
        """True on the rank of each replica that receives full weights and generates: first stage, tensor rank 0."""
        return self.tensor == 0 and self.pipeline == 0 and self._copy % self._copies_of_replica == 0

    @property
    def on_last_stage(self) -> bool:
        return self.pipeline == self.pipeline_size - 1

    def describe(self) -> str:
        """Sizes of the grid, for messages."""
        sizes = {"tensor": self.tensor_size, "pipeline": self.pipeline_size}
        sizes |= {"context": self.context_size, "data": self.data_size}
        return " x ".join(f"{name} {size}" for name, size in sizes.items())

    def barrier(self) -> None:
        """Barrier over all ranks."""
        if self.world > 1:
            dist.barrier()

    def gather_all(self, value: T) -> list[T]:
        """Gather an object from every rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def initialize(parallel: ParallelConfig, seed: int, environment: RankEnvironment | None = None) -> ParallelState:
    """Initialize the process group if needed, build Megatron's groups and seed its RNG tracker.

    Replaces Megatron groups of another layout that were built earlier in this process.

    Args:
        environment: this rank's place in the job. None: read from the environment variables; without these the job has
            one process.

    Raises:
        LaunchError: the variables are invalid, or ranks are missing after `parallel.rendezvous_timeout`.
        ConfigError: the number of ranks is not a multiple of tensor x pipeline x context, or of expert x
            expert_tensor x pipeline.
    """
    device.install()
    environment = environment or RankEnvironment.read()
    _check_world(parallel, environment)
    if not dist.is_initialized():
        _start_process_group(parallel, environment)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        distributed_timeout_minutes=max(1, round(parallel.timeout / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return current()


def _check_world(parallel: ParallelConfig, environment: RankEnvironment) -> None:
    world = dist.get_world_size() if dist.is_initialized() else environment.world_size
    for field, size in (
        ("parallel.tensor x parallel.context", parallel.tensor * parallel.context),
        ("parallel.expert x parallel.expert_tensor", parallel.expert_ranks),
    ):
        if world % (size * parallel.pipeline):
            raise ConfigError(
                f"{field} x parallel.pipeline",
                size * parallel.pipeline,
                f"a divisor of the number of ranks ({world})",
                f"start with torchrun --nproc-per-node {size * parallel.pipeline}, or a multiple of it",
            )


def _start_process_group(parallel: ParallelConfig, environment: RankEnvironment) -> None:
    gpu = ""
    if torch.cuda.is_available():
        gpu = _take_gpu(environment.local_rank)
        set_nccl_defaults(os.environ)
    limit = timedelta(seconds=parallel.timeout)
    # The device chooses the backend: Gloo for pickled objects (token lists, metrics), NCCL for GPU tensors.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if environment.world_size == 1:
        alone: Any = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=limit, store=alone, rank=0, world_size=1)
        return
    store = rendezvous(environment, parallel.rendezvous_timeout, gpu)
    rank, world_size = environment.rank, environment.world_size
    joining = timedelta(seconds=parallel.rendezvous_timeout)
    try:
        dist.init_process_group(backend, timeout=joining, store=store, rank=rank, world_size=world_size)
    except RuntimeError as error:
        found = f"ranks that cannot connect to each other ({str(error).splitlines()[0]})"
        fix = "set GLOO_SOCKET_IFNAME to the interface that reaches the other machines, and check if a rank ended"
        raise LaunchError("process group", found, "connections between all ranks", fix) from error
    _set_pg_timeout(limit)
    store.set_timeout(limit)


def set_nccl_defaults(variables: MutableMapping[str, str]) -> None:
    """Set the NCCL variables that SGLang sets for its servers, unless they are set. Call before any NCCL group exists.

    When weights are broadcast, the trainer shares a group with the servers, and all members need the same values.
    """
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        variables.setdefault(name, "0")


def _take_gpu(local_rank: int) -> str:
    """Make GPU `local_rank` the current device. Returns its name and machine, for messages."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        fix = "start fewer ranks on this machine, or make more GPUs visible to them (CUDA_VISIBLE_DEVICES)"
        raise LaunchError("LOCAL_RANK", str(local_rank), f"a number below this machine's {count} GPUs", fix)
    torch.cuda.set_device(local_rank)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    which = f" of CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    return f"GPU {local_rank}{which} on {socket.gethostname()}"


def current() -> ParallelState:
    """Read this rank's `ParallelState` from Megatron's global state."""
    state = parallel_state
    return ParallelState(
        world=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=state.get_tensor_model_parallel_rank(),
        tensor_size=state.get_tensor_model_parallel_world_size(),
        tensor_group=state.get_tensor_model_parallel_group(),
        pipeline=state.get_pipeline_model_parallel_rank(),
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        context=state.get_context_parallel_rank(),
        context_size=state.get_context_parallel_world_size(),
        context_group=state.get_context_parallel_group(),
        data=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        expert=state.get_expert_model_parallel_rank(),
        expert_size=state.get_expert_model_parallel_world_size(),
        expert_tensor=state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=state.get_expert_tensor_parallel_world_size(),
        expert_group=state.get_expert_tensor_and_model_parallel_group(),
    )


def shutdown() -> None:
    """Destroy Megatron's groups and the process group."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def split_evenly(items: Sequence[T], rank: int, size: int) -> Sequence[T]:
    """The `rank`-th of `size` contiguous parts whose lengths differ by at most one."""
    return items[len(items) * rank // size : len(items) * (rank + 1) // size]
