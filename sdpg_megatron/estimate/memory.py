"""Memory of each rank by part and phase, on its device and on the host, in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.estimate.activations import BYTES, Activations, HeadBytes, head_bytes, in_flight, kept
from sdpg_megatron.estimate.gpus import GIB
from sdpg_megatron.estimate.load import Load
from sdpg_megatron.estimate.shards import Grid, ParamAndGradBuffer, buffers, stage_shards
from sdpg_megatron.weights.map import hf_shapes

CONTEXT = 2 * GIB
"""Assumed overhead of each process on a GPU: CUDA context, NCCL and cuBLAS buffers."""
FRAGMENTS = 0.05
"""Assumed share of GPU memory that is lost to fragmentation."""
SLEEPING = 2 * GIB
"""Assumed memory of a colocated server that has released its memory."""
SERVER_SHARE = 0.85
"""Assumed value of `rollout.sglang.mem_fraction` if it is null."""

Parts = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Memory of the fullest rank of a pipeline stage."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    """Its share of the moments and, in bfloat16, of the float32 weights. Allocated by the first update."""
    numel: int
    """Number of parameters, without padding."""
    buffers: tuple[ParamAndGradBuffer, ...]
    phases: Mapping[str, Parts]
    """Device memory of each phase in addition to weights, gradients and optimizer."""
    absent: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Subset of weights, gradients and optimizer that is not on the device in a phase."""
    host: Parts = field(default_factory=dict)

    def parts(self, phase: str) -> dict[str, float]:
        own = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        here = {name: float(size) for name, size in own.items() if name not in self.absent.get(phase, ())}
        return {**here, **self.phases[phase]}

    def total(self, phase: str) -> float:
        return sum(self.parts(phase).values())

    @property
    def fullest(self) -> str:
        """Phase with the largest total."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.fullest)


def stage_memory(
    arch: Architecture,
    config: RunConfig,
    grid: Grid,
    load: Load,
    stage: int,
    memory: int | None,
    *,
    rank: int = 0,
    expert_rank: int = 0,
) -> StageMemory:
    """Plan the memory of one pipeline stage.

    Args:
        memory: bytes of the GPU; None on a CPU, which has other chunks in the head and no CUDA context.
        rank, expert_rank: rank for the share of the optimizer state, see `buffers`.
    """
    cuda = memory is not None
    chunks = stage_shards(arch, grid, stage)
    stage_buffers = [
        found
        for number, shards in enumerate(chunks)
        for found in buffers(
            shards, grid, config.optimizer, first=stage == 0 and number == 0, rank=rank, expert_rank=expert_rank
        )
    ]
    w = BYTES[config.model.dtype]
    numel = sum(shard.numel for shards in chunks for shard in shards)
    moments = 8 if w == 4 else 12  # in bfloat16 the optimizer also has float32 weights
    work = _Work(arch, config, grid, load, stage, cuda, w * numel, max(s.numel for shards in chunks for s in shards))
    served = config.rollout.engine == "sglang"
    colocated = served and config.rollout.sglang.colocated
    weights = w * sum(buffer.numel if buffer.padded else 0 for buffer in stage_buffers)
    own_copies = 0 if config.optimizer.distributed else w * numel
    optimizer = moments * sum(buffer.own for buffer in stage_buffers)
    phases: dict[str, dict[str, float]] = {"passes": work.passes(), "update": work.update(), "publish": work.publish()}
    if not served:
        phases["rollout"] = work.embedded()
    if memory is not None:
        for name in (*phases, *(["rollout"] if served else [])):
            parts: dict[str, float] = {**phases.get(name, {}), "context": CONTEXT}
            if colocated:
                awake = name in ("rollout", "publish")
                parts["server"] = _server_room(config, memory, weights + own_copies) if awake else SLEEPING
            phases[name] = parts
    offloaded = frozenset({"gradients", "optimizer"} if colocated else ())
    return StageMemory(
        stage=stage,
        weights=weights + own_copies,
        gradients=4 * sum(buffer.numel for buffer in stage_buffers),
        optimizer=optimizer,
        numel=numel,
        buffers=tuple(stage_buffers),
        phases=phases,
        absent={"rollout": offloaded, "publish": offloaded},
        host=work.host(optimizer),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """Memory of a stage's phases in addition to weights, gradients and optimizer."""

    arch: Architecture
    config: RunConfig
    grid: Grid
    load: Load
    stage: int
    cuda: bool
    weights: int
    """Bytes of the weights, without padding."""
    largest: int
    """Elements of the largest parameter."""

    @property
    def last(self) -> bool:
        return self.stage == self.grid.pipeline - 1

    @property
    def width(self) -> int:
        return BYTES[self.config.model.dtype]

    def _head(self, *, train: bool) -> HeadBytes:
        rows = -(-self.load.response // self.grid.context)
        return head_bytes(
            self.arch,
            self.config.head,
            self.grid,
            self.config.model.dtype,
            rows,
            distill=self.load.required_passes.teacher,
            cuda=self.cuda,
            train=train,
        )

    def update(self) -> dict[str, float]:
        """Memory of the training pass."""
        model, grid = self.config.model, self.grid
        a = Activations.of(self.arch, model, self.config.parallel, cuda=self.cuda)
        tokens = self.load.student / grid.context
        layers = self.arch.num_layers // grid.pipeline
        passes = in_flight(grid, self.stage, self.load.micro_batches)
        held = kept(a, layers, tokens, passes, recompute=model.recompute, received=self.stage > 0, last=self.last)
        # The embedding's gradient, as the rest of the backward pass, is allocated after the head's memory is freed.
        embedding = 2 * self.width * self.largest if self.stage == 0 else 0
        layer = tokens * a.working
        parts = {"activations": held}
        if self.last:
            head = self._head(train=True)
            parts |= {"head": float(max(head.all, layer)), "teacher rows": float(self._teacher_rows(train=True))}
        else:
            parts["gradients of a layer"] = layer
        if embedding > sum(parts.values()):
            parts["gradient of the embedding"] = embedding - sum(parts.values())
        return parts

    def _teacher_rows(self, *, train: bool) -> int:
        """Bytes of the teacher rows of all micro-batches on the device.

        0 if they are moved to the host before the step's first update, or if only their log-probs are needed in
        training.
        """
        required_passes = self.load.required_passes
        if not (required_passes.teacher or (required_passes.teacher_logprob and not train)) or self._early:
            return 0
        return -(-self.load.teacher_rows // self.grid.context) * self.arch.hidden_size * self.width

    @property
    def _early(self) -> bool:
        objective, minibatches = self.config.objective, self.config.optimizer.minibatches
        return self.load.required_passes.teacher and objective.teacher == "rollout" and minibatches > 1

    @property
    def _swaps(self) -> bool:
        required_passes = self.load.required_passes
        return required_passes.reference or (
            required_passes.privileged and self.config.objective.teacher in ("every", "initial", "ema")
        )

    def passes(self) -> dict[str, float]:
        """Memory of the forward-only passes: old and reference log-probs, teacher."""
        a = Activations.of(self.arch, self.config.model, self.config.parallel, cuda=self.cuda)
        tokens = max(self.load.student, self.load.teacher) / self.grid.context
        parts = {"activations": tokens * (a.layer + a.final_norm)}
        if self.last:
            head = self._head(train=False)
            parts |= {"head": float(head.all), "teacher rows": float(self._teacher_rows(train=False))}
        if self._swaps and self.cuda:  # on CPUs the model computes with the copy in host memory
            parts["other weights"] = float(self.weights)
        return parts

    def publish(self) -> dict[str, float]:
        """Memory of a publish: the leader's buckets; one parameter on the first rank of other stages."""
        served = self.config.rollout.sglang
        w = BYTES[served.dtype or self.config.model.dtype]
        tensor = max(math.prod(shape) for shape in hf_shapes(self.arch).values()) * w
        shards = tensor * (self.grid.tensor - 1) / self.grid.tensor
        if self.stage:
            return {"publish buckets": tensor + shards}
        bucket = max(served.bucket_mib << 20, tensor)
        return {"publish buckets": 2 * bucket + shards}

    def embedded(self) -> dict[str, float]:
        """Memory of the transformers model with its KV cache, on a replica's first rank."""
        if self.stage:
            return {}
        whole = sum(math.prod(shape) for shape in hf_shapes(self.arch).values())
        rollout = self.config.rollout
        tokens = rollout.batch_size * (self.config.data.max_prompt_tokens + rollout.max_response_tokens)
        logits = 2 * 4 * rollout.batch_size * self.arch.vocab_size
        keys = float(tokens * kv_bytes(self.arch, self.width))
        return {"rollout engine": float(whole * self.width + logits), "keys and values": keys}

    def host(self, optimizer: int) -> dict[str, float]:
        """Memory on the host."""
        objective, required_passes = self.config.objective, self.load.required_passes
        parts: dict[str, float] = {}
        initial = required_passes.privileged and objective.teacher == "initial"
        if required_passes.reference or initial:
            parts["reference" if required_passes.reference else "teacher"] = self.weights
        if required_passes.privileged and objective.teacher == "every":
            parts["teacher"] = self.weights
        if required_passes.privileged and objective.teacher == "ema":
            parts["teacher"] = self.weights * 4 // self.width
        if self._early and self.last:
            rows = -(-self.load.teacher_rows * self.config.optimizer.minibatches // self.grid.context)
            parts["teacher rows"] = rows * self.arch.hidden_size * self.width
        if self.config.checkpoint.asynchronous:
            moving = self.cuda and objective.teacher in ("every", "ema")  # pinned, and therefore copied
            parts["checkpoint being written"] = self.weights + optimizer + (parts.get("teacher", 0) if moving else 0)
        if self.cuda and self.config.rollout.engine == "sglang" and self.config.rollout.sglang.colocated:
            parts["optimizer while serving"] = optimizer
        return parts


def kv_bytes(arch: Architecture, width: int) -> int:
    """Bytes of keys and values per token."""
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * width


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """One GPU of a rollout server."""

    weights: int
    pool: float
    """Bytes for keys and values; negative if not even the weights fit."""
    token: float
    """Bytes of keys and values per token."""
    longest: int
    """Tokens of the longest sequence."""

    @property
    def sequences(self) -> int:
        """Number of longest sequences that can run at a time."""
        return max(0, int(self.pool // (self.token * self.longest)))


def server_memory(arch: Architecture, config: RunConfig, memory: int, trainer: float) -> ServerMemory:
    """Plan a server's GPU.

    Args:
        memory: bytes of the GPU.
        trainer: bytes that a colocated trainer holds when the server starts.
    """
    served = config.rollout.sglang
    w = BYTES[served.dtype or config.model.dtype]
    split = served.tensor
    whole = sum(math.prod(shape) for shape in hf_shapes(arch).values())
    weights = w * -(-whole // split)
    keys = kv_bytes(arch, w) / min(split, arch.num_kv_heads)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return ServerMemory(weights, _server_room(config, memory, trainer) - weights, keys, longest)


def _server_room(config: RunConfig, memory: int, trainer: float) -> float:
    """Bytes for weights, keys and values: a share of the free memory."""
    return (memory - CONTEXT - trainer) * (config.rollout.sglang.mem_fraction or SERVER_SHARE)


def room(memory: int) -> float:
    """Usable bytes of a GPU's memory."""
    return memory * (1 - FRAGMENTS)
