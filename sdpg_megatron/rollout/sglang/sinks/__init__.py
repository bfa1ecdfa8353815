"""Ways for a weight stream to reach servers: a process group, shared memory, a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.rollout.sglang.sinks.base import Failures, Sink
from sdpg_megatron.rollout.sglang.sinks.broadcast import BroadcastSink
from sdpg_megatron.rollout.sglang.sinks.disk import DiskSink
from sdpg_megatron.rollout.sglang.sinks.shared import SharedSink

__all__ = ["BroadcastSink", "DiskSink", "Failures", "SharedSink", "Sink", "make_sink"]


def make_sink(config: SGLangConfig, *, nonce: str, device: torch.device, run_dir: Path, model_folder: Path) -> Sink:
    """The sink that a run's configuration asks for.

    Args:
        nonce: unique to the run.
        device: where buckets come from.
        run_dir: the disk sink writes to sglang/ in it, where no folder is configured.
        model_folder: Hugging Face folder with the model's configuration and tokenizer.
    """
    match config.sink:
        case "broadcast":
            return BroadcastSink(nonce=nonce, device=device, address=config.address, seconds=config.update_timeout)
        case "shared":
            return SharedSink()
        case "disk":
            folder = config.folder or run_dir / "sglang"
            return DiskSink(folder=folder, source_folder=model_folder, shard_bytes=config.bucket_mib << 20)
