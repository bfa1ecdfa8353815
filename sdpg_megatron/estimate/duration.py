"""Time of each phase of a step: operations and bytes, over a GPU's rates times assumed efficiencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.estimate.activations import BYTES
from sdpg_megatron.estimate.gpus import Gpu
from sdpg_megatron.estimate.load import Load
from sdpg_megatron.estimate.memory import ServerMemory, kv_bytes
from sdpg_megatron.estimate.shards import Grid, count_active, count_parameters
from sdpg_megatron.estimate.traffic import Flow


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Assumed shares of the theoretical rates; not fitted to measurements on a GPU."""

    products: float = 0.4
    """Trainer's FLOPS, including attention and elementwise operations."""
    reading: float = 0.6
    """Servers' memory bandwidth during generation."""
    embedded: float = 0.1
    """Memory bandwidth during generation with transformers in the trainer."""
    sending: float = 0.7
    """Links, in the trainer."""
    publishing: float = 0.4
    """Links, during a publish to servers."""


ASSUMED = Efficiency()
CALL = 0.02
"""Assumed seconds per call to the servers."""


def durations(
    arch: Architecture,
    config: RunConfig,
    grid: Grid,
    load: Load,
    gpu: Gpu,
    traffic: Mapping[str, Flow],
    server: ServerMemory | None,
) -> dict[str, float]:
    """Seconds of each phase of a rollout step."""
    forward = _forward(arch, load.mean_prompt + load.mean_response)
    row = 2 * arch.hidden_size * arch.vocab_size
    heads = load.old_logprobs + load.required_passes.reference + load.gated * load.required_passes.teacher_logprob
    passes = load.mean_forward_only * forward + load.mean_responses * row * heads
    head_recompute = config.head.schedule == "recompute"
    head_rows = (3 + head_recompute) * load.mean_responses  # logits and both gradients
    if load.required_passes.teacher:
        head_rows += (1 + head_recompute) * load.gated * load.mean_responses
    update = load.mean_student * (3 + config.model.recompute) * forward + head_rows * row
    rate = grid.world * gpu.flops * ASSUMED.products
    bubble = 1 + (grid.pipeline - 1) / (load.micro_batches * grid.chunks)
    return {
        "rollout": _rollout(arch, config, grid, load, gpu, server),
        "passes": passes / rate * bubble + _sending("passes", traffic, gpu),
        "update": update / rate * bubble + _sending("update", traffic, gpu),
        "publish": _sending("publish", traffic, gpu)
        + traffic["publish"].sent["publish"] / (config.rollout.sglang.bucket_mib << 20) * CALL,
    }


def step_seconds(seconds: Mapping[str, float], ahead: int) -> float:
    """Seconds of a whole step. With `ahead` (`RolloutConfig.ahead`) generation overlaps all phases but the publish."""
    learning = seconds["passes"] + seconds["update"]
    together = max(seconds["rollout"], learning) if ahead else seconds["rollout"] + learning
    return together + seconds["publish"]


def _sending(phase: str, traffic: Mapping[str, Flow], gpu: Gpu) -> float:
    seconds = 0.0
    for kind, flow in traffic.items():
        share = ASSUMED.publishing if kind == "publish" else ASSUMED.sending
        seconds += flow.sent.get(phase, 0.0) / ((gpu.link if flow.local else gpu.network) * share)
    return seconds


def _forward(arch: Architecture, length: float) -> float:
    """Forward operations per token, in a sequence of `length`."""
    attention = 2 * arch.num_layers * arch.num_heads * arch.head_dim * length  # two products over half the positions
    return 2 * count_active(arch) + attention


def _rollout(
    arch: Architecture, config: RunConfig, grid: Grid, load: Load, gpu: Gpu, server: ServerMemory | None
) -> float:
    """Generation time, bound by reading weights, keys and values, and by the longest response alone."""
    served = config.rollout.sglang
    if server is None:
        engines, devices = max(1, grid.world // (grid.tensor * grid.pipeline)), 1
        together, share = float(config.rollout.batch_size), ASSUMED.embedded
    else:
        engines = (len(served.urls) or served.servers) * served.data
        devices, share = served.tensor, ASSUMED.reading
        room = server.pool / (server.token * (load.mean_prompt + load.mean_response))
        together = max(1.0, room)
    together = min(together, max(1.0, load.samples / engines))
    width = BYTES[served.dtype or config.model.dtype]
    context = load.mean_prompt + load.mean_response / 2
    rate = gpu.bandwidth * share * devices

    def step(sequences: float) -> float:
        keys = sequences * context * kv_bytes(arch, width)
        read = (_weights_read(arch, sequences) * width + keys) / rate
        operations = 2 * sequences * (count_active(arch) + arch.hidden_size * arch.vocab_size)
        return max(read, operations / (gpu.flops * devices * ASSUMED.products))

    tokens = load.mean_responses / engines
    prompts = load.mean_prompt * config.rollout.prompts_per_step / engines  # each prefilled once per group
    reading = prompts * _forward(arch, load.mean_prompt) / (gpu.flops * devices * ASSUMED.products)
    return reading + max(tokens / together * step(together), config.rollout.max_response_tokens * step(1))


def _weights_read(arch: Architecture, sequences: float) -> float:
    """Parameters that a generation step reads: all but the experts that no sequence is routed to."""
    whole = count_parameters(arch)
    if arch.experts is None:
        return float(whole)
    idle = arch.experts.count - min(arch.experts.count, sequences * arch.experts.per_token)
    return whole - arch.num_layers * idle * 3 * arch.hidden_size * arch.ffn_size
