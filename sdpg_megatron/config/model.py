"""Sections `model`, `parallel`, `head` and `optimizer`: model, parallel layout, output head and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from sdpg_megatron.config.base import MAX_SECONDS, Section


class ModelConfig(Section):
    """The trained model."""

    path: Path
    """Hugging Face folder with config.json, safetensors and a tokenizer with a chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of parameters and activations. The sums of the output head, gradient accumulation and reduction, and
    the optimizer with its copy of the weights always use float32."""
    spec: Literal["auto", "local", "te"] = "auto"
    """Layer implementation: Transformer Engine (`te`) or this package (`local`). `auto` selects `te` if Transformer
    Engine is installed, a GPU is present and `dtype` is bfloat16; its attention does not support packed sequences in
    float32."""
    recompute: bool = False
    """Recompute the activations of each layer in the backward pass instead of storing them."""
    packed: bool = True
    """Pack the sequences of a micro-batch into one row without padding. If false, sequences are padded to the longest
    of the micro-batch, for attention kernels that need it."""
    gradient_accumulation_fusion: bool = False
    """Accumulate weight gradients into the float32 buffers within the matrix products of linear layers. Needs apex with
    its CUDA extensions."""
    activation_fusion: bool = True
    """Compute the gated activation as one compiled kernel. No effect without a GPU or without Triton."""
    router_aux_loss: float = Field(0.0, ge=0)
    """Coefficient, per layer, of the load-balancing loss of a mixture of experts. It balances the tokens of each
    sequence; docs/experts.md has the formula. 0: no such loss."""
    router_z_loss: float = Field(0.0, ge=0)
    """Coefficient, per layer, of the router z-loss, the squared log-sum-exp of the router logits. 0: no such loss."""


class ParallelConfig(Section):
    """Parallel layout. Data parallelism takes the ranks that the other dimensions leave."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size."""
    pipeline: int = Field(1, ge=1)
    """Number of pipeline stages."""
    virtual_pipeline: int | None = Field(None, ge=2)
    """Model chunks per pipeline stage, for the interleaved schedule. Null: 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism: shard activations outside attention and MLP over the tensor-parallel ranks. Required for a
    mixture of experts if `tensor` is above 1."""
    context: int = Field(1, ge=1)
    """Context-parallel size: each rank holds a part of every sequence's tokens. Needs `model.packed`."""
    expert: int = Field(1, ge=1)
    """Expert-parallel size of a mixture of experts: each rank holds a part of every layer's experts. Expert-parallel
    groups are formed from the tensor-, context- and data-parallel ranks."""
    expert_tensor: int | None = Field(None, ge=1)
    """Tensor-parallel size of each expert. Null: `tensor`."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """Token exchange between experts. `alltoall` sends each token to the ranks of its experts only. `allgather` sends
    all tokens to all ranks and sums the results; it needs a single pipeline stage and experts that are sharded over the
    tensor-parallel ranks only."""
    timeout: float = Field(4 * 3600.0, gt=0, le=MAX_SECONDS)
    """Timeout of a collective, in seconds. It must cover the generation of a step, because ranks that do not generate
    wait for those that do."""
    rendezvous_timeout: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Time limit, in seconds, until all ranks have joined the run. Each rank reads the model's configuration first."""

    @property
    def expert_tensor_size(self) -> int:
        """Tensor-parallel size of each expert."""
        return self.expert_tensor or self.tensor

    @property
    def expert_ranks(self) -> int:
        """Number of ranks of a pipeline stage that together hold one copy of its experts."""
        return self.expert * self.expert_tensor_size


class HeadConfig(Section):
    """Computation of the output head. These fields change results by rounding only."""

    schedule: Literal["auto", "grad_in_forward", "recompute"] = "auto"
    """`grad_in_forward` computes the logits once and stores the gradients of hidden states and output matrix until the
    backward pass. `recompute` stores almost nothing and computes the logits again in the backward pass. `auto` selects
    `grad_in_forward`, which is faster, if it fits the memory that is free when the model is built."""
    chunk_rows: int | None = Field(None, ge=1)
    """Number of rows (tokens) of logits in memory at a time; twice as many for rows without a teacher. Null:
    derived from the free memory."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of elementwise operations. `auto` selects Triton if it is installed and a GPU is present, else
    torch."""
    main_grad: bool = True
    """Accumulate the gradient of the output matrix directly in Megatron's float32 buffer, without rounding it to
    `model.dtype`."""


class OptimizerConfig(Section):
    """AdamW, learning rate schedule and mini-batches."""

    lr: float = Field(1e-6, gt=0, le=1e3)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0, le=1e3)
    """Learning rate at the end of a `linear` or `cosine` schedule. At most `lr`."""
    warmup_steps: int = Field(10, ge=0)
    """Number of optimizer steps over which the learning rate rises linearly to `lr`. 0: no warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up. `linear` and `cosine` reach `min_lr` at the end of the run."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay rate of the second moment."""
    eps: float = Field(1e-8, gt=0, le=1e3)
    """Term added to the denominator of the update for numerical stability."""
    weight_decay: float = Field(0.1, ge=0, le=1e36)
    """Decoupled weight decay. 0: none."""
    clip_grad: float = Field(1.0, ge=0, le=1e30)
    """Maximum global gradient norm. 0: no clipping."""
    skip_limit: int = Field(5, ge=1)
    """Number of consecutive optimizer steps with a loss or gradient that is not finite after which the run ends. Up to
    then such steps are skipped. 1: the run ends at the first."""
    minibatches: int = Field(1, ge=1)
    """Number of mini-batches, and of optimizer steps, per rollout step. Must divide `rollout.prompts_per_step`."""
    micro_batch_size: int = Field(8, ge=1)
    """Number of sequences per forward and backward pass."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens per forward and backward pass, over all context-parallel ranks and including the
    teacher's sequences; replaces `micro_batch_size`. A sample that exceeds it gets a micro-batch of one. Needs
    `model.packed`. Null: `micro_batch_size` applies."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks (Megatron's distributed optimizer)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks during the backward pass of the last micro-batch."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass, layer by layer, unless something else reads the weights
    first. Needs `distributed` and `overlap_grad_reduce`."""
    bucket_size: int | None = Field(None, ge=1)
    """Number of parameters per communication bucket; only with `overlap_grad_reduce`. Null: Megatron's default, at
    least 40 million."""
