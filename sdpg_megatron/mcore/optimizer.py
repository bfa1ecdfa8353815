"""Build Megatron's DDP wrapper, optimizer and learning-rate schedule from the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sdpg_megatron.config import OptimizerConfig
from sdpg_megatron.mcore import gradient_norm

HYPERPARAMETERS = ("betas", "eps", "max_lr", "min_lr")
"""Keys of a parameter group, except learning rate and weight decay, which the scheduler sets at every step."""


def wrap(chunks: Sequence[GPTModel], config: OptimizerConfig) -> list[DistributedDataParallel]:
    """Wrap every chunk in Megatron's DDP, with float32 gradient buffers reduced over data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        bucket_size=config.bucket_size,
        use_distributed_optimizer=config.distributed,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    model_config = wrapped[0].config
    model_config.finalize_model_grads_func = finalize_model_grads
    no_sync = [chunk.no_sync for chunk in wrapped]
    model_config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather the updated parameter shards now instead of in the next forward pass (`overlap_param_gather`).

    Collective over the data-parallel ranks.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def build_optimizer(chunks: Sequence[DistributedDataParallel], config: OptimizerConfig) -> Any:
    """Build AdamW; with `config.distributed` its state is sharded over data-parallel ranks."""
    gradient_norm.install()
    dtype = chunks[0].config.params_dtype
    built = mcore_optimizer.get_megatron_optimizer(
        mcore_optimizer.OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad or math.inf,  # with 0 Megatron does not compute the norm
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
            overlap_param_gather=config.overlap_param_gather,
        ),
        list(chunks),
    )
    chunks[0].config.grad_scale_func = built.scale_loss
    if torch.cuda.is_available():
        fuse_torch_adam(built)
    return built


def fuse_torch_adam(optimizer: Any) -> None:
    """Use the fused kernel of torch's AdamW, which Megatron uses without apex and Transformer Engine.

    The default implementation allocates temporaries of 4 bytes per parameter. Call before the first step.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW | torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group |= {"fused": True, "foreach": False}


def ready_gradients(optimizer: Any) -> float:
    """Reduce and clip the gradients without updating the weights; call ``optimizer.step_with_ready_grads()`` next.

    Megatron's ``step()`` updates the weights even if the norm is not finite.

    Returns:
        Global gradient norm before clipping; NaN on overflow.
    """
    optimizer.step_with_ready_grads = lambda: True
    try:
        ready, norm, _ = optimizer.step()
    finally:
        del optimizer.step_with_ready_grads
    return float(norm) if ready else math.nan


@contextmanager
def keeping_hyperparameters(optimizer: Any) -> Iterator[None]:
    """Restore the configured hyperparameters on exit, after a state with other values was loaded inside."""
    before = [{name: group[name] for name in HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, before, strict=True):
        group.update(values)


def build_scheduler(optimizer: Any, config: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    """Schedule: linear warm-up from lr / warmup_steps at the first step, then `config.schedule` to `min_lr`."""
    warmup = max(config.warmup_steps, 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / warmup,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup - 1,
        lr_decay_steps=max(total_steps, warmup),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # from a checkpoint only the position: the configuration may have changed
    )
