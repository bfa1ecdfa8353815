"""Export the trainer's weights: as a stream, or as a Hugging Face folder, also from a checkpoint."""

from __future__ import annotations

import gc
from collections import deque
from pathlib import Path

import torch

from sdpg_megatron import objectives
from sdpg_megatron.architecture import Architecture, check_parallel
from sdpg_megatron.checkpoint.state import MANIFEST, RunState, check_same_model, fingerprint
from sdpg_megatron.checkpoint.store import CheckpointStore
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import SdpgError
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.policy import Policy
from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
from sdpg_megatron.observe.files import writing
from sdpg_megatron.train.run_dir import EXPORT_FOLDER
from sdpg_megatron.weights import WeightStream, write_folder


def stream_weights(config: RunConfig, policy: Policy, dtype: torch.dtype | None = None) -> WeightStream:
    """Stream this replica's weights as full Hugging Face tensors; every rank of the replica iterates."""
    return WeightStream(
        policy.named_weights(),
        policy.arch,
        tp_group=policy.ranks.tensor_group,
        pp_group=policy.ranks.pipeline_group,
        expert_group=policy.ranks.expert_group,
        expert_tensor=policy.ranks.expert_tensor_size,
        bucket_bytes=config.rollout.sglang.bucket_mib << 20,
        dtype=dtype,
    )


def export_weights(config: RunConfig, policy_trainer: PolicyTrainer, target: Path) -> None:
    """Write the weights as a Hugging Face folder, with all other files from the initial model. Every rank calls it.

    Raises:
        WriteError: a file cannot be written; on every rank.
        SdpgError: as `write_folder`, on every rank.
    """
    ranks = policy_trainer.ranks
    buckets = iter(stream_weights(config, policy_trainer) if ranks.replica == 0 else ())

    def write() -> None:
        try:
            with writing(target):
                write_folder(buckets, target, source_folder=config.model.path)
        except SdpgError:
            deque(buckets, maxlen=0)  # drain it, as its source is collective
            raise

    if not ranks.is_main:
        deque(buckets, maxlen=0)
    on_main(ranks, write)


def export_checkpoint(config: RunConfig, arch: Architecture, checkpoint: Path) -> Path:
    """Export a checkpoint's weights to a Hugging Face folder in it, unless it exists; return the folder.

    Every rank calls it, after `parallel.initialize`. An export leaves the process groups of `config.parallel`.

    Raises:
        ConfigError: `model.path` is not the run's initial model, or the number of ranks does not fit `config.parallel`.
        CheckpointError: the checkpoint is damaged.
    """
    target = checkpoint / EXPORT_FOLDER
    if any(parallel.current().gather_all((target / "config.json").exists())):
        return target
    state = RunState.read(checkpoint / MANIFEST)
    check_same_model(state, fingerprint(config.model.path))
    check_parallel(arch, config.parallel)
    ranks = parallel.initialize(config.parallel, config.seed)
    objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
    policy_trainer = PolicyTrainer(config, arch, objective, ranks)
    CheckpointStore(checkpoint.parent, ranks, config.checkpoint).load(checkpoint, state, policy_trainer)
    export_weights(config, policy_trainer, target)
    ranks.barrier()
    del policy_trainer
    gc.collect()  # Megatron's wrappers refer to one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return target
