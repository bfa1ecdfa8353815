"""Transformer layer specs: megatron-core's parallel linears without Transformer Engine, or Transformer Engine's layers.

Without Transformer Engine, three local modules of megatron-core are replaced: its norm does not support sequence
parallelism, its attention core materializes all scores (replaced by `mcore.attention`), and its rotary embedding
recomputes cosines in each layer (replaced by `mcore.rotary`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from sdpg_megatron.mcore import rotary
from sdpg_megatron.mcore.attention import CausalAttention
from sdpg_megatron.mcore.compiled import CompiledOnGpu
from sdpg_megatron.mcore.routing import use_own_router

SHORT_ROW = 256
"""Rows up to this size, such as the heads of the query and key norms, are normalized by a compiled kernel on a GPU.
torch's kernel works on one row per thread block, which short rows do not fill."""


class RMSNorm(torch.nn.Module):
    """RMS norm in float32, as in Hugging Face's Llama and Qwen.

    Under sequence parallelism the weight is marked, so that Megatron sums its gradient over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        norm = rms_norm_on_gpu if len(self.weight) <= SHORT_ROW else rms_norm
        return norm(hidden, self.weight, self.eps)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(hidden, weight.shape, weight, eps)


rms_norm_on_gpu = CompiledOnGpu(rms_norm, token_inputs=1)
"""`rms_norm`, as one kernel on a GPU."""


def local_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Spec of this stage's layers without Transformer Engine."""
    rotary.install()
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    if config.num_moe_experts:
        use_own_router(layer)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def te_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Spec of Transformer Engine's fused layer."""
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    if config.num_moe_experts:
        use_own_router(layer)
    return layer
