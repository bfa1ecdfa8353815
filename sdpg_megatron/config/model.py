"""Sections `model`, `parallel`, `head` and `optimizer`: what is trained, and how it is laid out and computed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section


class ModelConfig(Section):
    """Model and how its layers are computed."""

    path: Path
    """Hugging Face folder: config.json, safetensors, tokenizer with a chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameter and activation type. The head's sums, the buffers that gradients are added up in over micro-batches and
    ranks, and the optimizer with its own copy of the weights are float32 either way."""
    spec: Literal["auto", "local", "te"] = "auto"
    """Layer implementation: Transformer Engine's or this package's. "auto" takes the former where it is installed, a
    GPU is present and `dtype` is bfloat16: its attention has no float32 for packed sequences."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass."""
    packed: bool = True
    """Sequences of a micro-batch lie one after the other, without padding; otherwise padded to the longest of them, for
    attention kernels that want it."""
    gradient_accumulation_fusion: bool = False
    """Linear layers add to the float32 gradient buffers within their matrix products: needs apex's CUDA extension."""
    activation_fusion: bool = True
    """Compute the gated activation as one compiled kernel on a GPU. No effect without a GPU or without Triton."""
    router_aux_loss: float = Field(0.0, ge=0)
    """Coefficient of a mixture of experts' load-balancing loss, for each layer; 0 for none. It balances each sequence's
    tokens; docs/experts.md has the formula."""
    router_z_loss: float = Field(0.0, ge=0)
    """Coefficient of the router's z-loss, the squared log-sum-exp of its logits, for each layer; 0 for none."""


class ParallelConfig(Section):
    """Sizes of the parallel groups."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int | None = Field(None, ge=2)
    """Model chunks per pipeline stage (interleaved schedule); null for the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism: shard activations outside attention and MLP over the tensor-parallel ranks. A mixture of
    experts needs it where `tensor` is over 1."""
    context: int = Field(1, ge=1)
    """Context-parallel ranks: each holds a share of every sequence's tokens. Needs `model.packed`."""
    expert: int = Field(1, ge=1)
    """Expert-parallel ranks of a mixture of experts: each holds its share of every layer's experts. They are taken from
    the tensor-, context- and data-parallel ones."""
    expert_tensor: int | None = Field(None, ge=1)
    """Tensor-parallel ranks of each expert; null for `tensor`."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens come to the ranks of their experts: each to those alone, or all to all of them and only the results
    summed. The latter where experts are spread over the tensor-parallel ranks alone, in a single pipeline stage."""
    timeout: float = Field(4 * 3600.0, gt=0, le=MAX_SECONDS)
    """Seconds that a rank waits for the others in a collective. Ranks that do not generate wait for those that do."""
    rendezvous_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Seconds until all ranks have joined the run, each after it has read the model's description."""

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel ranks of each expert."""
        return self.expert_tensor or self.tensor

    @property
    def expert_ranks(self) -> int:
        """Ranks of a pipeline stage that hold one copy of its experts between them."""
        return self.expert * self.expert_tensor_size


class HeadConfig(Section):
    """How the output head is computed. None of this changes what is computed, beyond rounding."""

    schedule: Literal["auto", "grad_in_forward", "recompute"] = "auto"
    """grad_in_forward makes the logits once and keeps the gradients of hidden rows and vocabulary matrix until the
    backward pass. recompute keeps next to nothing and makes the logits again in it. auto is grad_in_forward, which is
    faster, unless its memory does not fit what is free when the model is built."""
    chunk_rows: int | None = Field(None, ge=1)
    """Rows whose logits are held at a time where they have a teacher, twice as many where they have none; null for what
    fits the free memory."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Elementwise work; auto is Triton where there is a GPU and Triton, else plain torch."""
    main_grad: bool = True
    """Add the vocabulary matrix's gradient to Megatron's float32 buffer, never rounding it to the weight's type."""


class OptimizerConfig(Section):
    """AdamW, its schedule, mini-batches and micro-batches."""

    lr: float = Field(1e-6, gt=0, le=1e3)
    min_lr: float = Field(0.0, ge=0, le=1e3)
    warmup_steps: int = Field(10, ge=0)
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; "linear" and "cosine" reach `min_lr` when the run ends."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, le=1e3)
    weight_decay: float = Field(0.1, ge=0, le=1e36)
    clip_grad: float = Field(1.0, ge=0, le=1e30)
    """Global gradient-norm bound; 0 for none."""
    skip_limit: int = Field(5, ge=1)
    """An optimizer step whose loss or gradient is not finite is skipped; so many in a row end the run. 1 ends it at the
    first."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per rollout; prompts are split evenly over them."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences per forward and backward pass."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """In the place of `micro_batch_size`: tokens per forward and backward pass, those that the teacher reads included,
    and of all context-parallel ranks together. A response that has more with its prompts is alone. Needs
    `model.packed`."""
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel ranks while the backward pass of the last micro-batch goes on."""
    overlap_param_gather: bool = False
    """Gather sharded updates as the next mini-batch's layers need them, where nothing else reads the weights first."""
    bucket_size: int | None = Field(None, ge=1)
    """Parameters that travel together where communication overlaps; null for Megatron's choice, 40 million or more."""
