"""Transformer layers out of megatron-core's parallel linears, for machines without Transformer Engine.

Three parts replace megatron-core's local ones: its norm refuses sequence parallelism, its attention core
(`mcore.attention` is ours) materialises all scores, and its rotary embedding (ours is `mcore.rotary`) makes cosines
anew in each layer.
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
from sdpg_megatron.mcore.routing import use_own_router


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in float32, as Hugging Face's Llama and Qwen compute it.

    Under sequence parallelism its weight is marked, so that Megatron sums its gradient over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def local_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """This stage's layers from megatron-core's own modules, with the parts above."""
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
    """Transformer Engine's fused layer."""
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    if config.num_moe_experts:
        use_own_router(layer)
    return layer
