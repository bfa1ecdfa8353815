"""Build this rank's GPTModel chunks from a Hugging Face architecture, and name their parameters globally."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional

from sdpg_megatron.architecture import Architecture, Experts
from sdpg_megatron.config import ModelConfig, ParallelConfig
from sdpg_megatron.mcore import layers
from sdpg_megatron.mcore.compat.device import check_layers, has_compiled_kernels, has_te
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.mcore.routing import deliver_numbers
from sdpg_megatron.weights.load import load_shards
from sdpg_megatron.weights.map import ExpertShare, weight_map

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)")
_EXPERT = re.compile(r"(\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)")


def transformer_config(arch: Architecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration of the network.

    With `calculate_per_token_loss`, the loss function returns sums, and the gradients are divided once by the global
    number of response tokens.
    """
    dtype = getattr(torch, model.dtype)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_eps,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # The initialization marks parameters as tensor-parallel, so it must run; the weights are loaded later.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        **(_experts(arch.experts, arch.ffn_size, grouped=uses_te(model)) if arch.experts else {}),
        variable_seq_lengths=parallel.pipeline > 1,
        # Interleaved over two stages, the next and the previous stage are the same rank. One batch with sends and
        # receives of both directions would match them by order and mix them up. With overlap the directions are
        # separate.
        overlap_p2p_comm=bool(parallel.virtual_pipeline),
        batch_p2p_comm=not parallel.virtual_pipeline,
        # megatron-core's default does not support variable lengths, even without experts.
        moe_token_dispatcher_type=parallel.dispatcher,
        calculate_per_token_loss=True,
        recompute_granularity="full" if model.recompute else None,
        recompute_method="uniform" if model.recompute else None,
        recompute_num_layers=1 if model.recompute else None,
        gradient_accumulation_fusion=model.gradient_accumulation_fusion,
        bias_activation_fusion=model.activation_fusion and has_compiled_kernels(),
        # Fusions that need CUDA kernels from apex or Transformer Engine.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=uses_te(model),
    )


def _experts(experts: Experts, ffn_size: int, *, grouped: bool) -> dict[str, Any]:
    """Megatron's configuration of a mixture of experts. Router logits are in the model's type."""
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": ffn_size,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "none",  # `routing.Router` has the losses
        "moe_grouped_gemm": grouped,
    }


def _leave_unset(weight: Tensor) -> Tensor:
    return weight


def build_chunks(
    arch: Architecture, model: ModelConfig, parallel: ParallelConfig, ranks: ParallelState
) -> list[GPTModel]:
    """Build this rank's model chunks (one, or `parallel.virtual_pipeline`) with uninitialized weights.

    Raises:
        ConfigError: `model.spec` needs Transformer Engine, which is not available.
    """
    check_layers(model)
    config = transformer_config(arch, model, parallel)
    count = parallel.virtual_pipeline or 1
    chunks = [_build_chunk(arch, model, config, ranks, vp_stage, count) for vp_stage in range(count)]
    mark_sharded(chunks, arch)
    return chunks


def _build_chunk(
    arch: Architecture, model: ModelConfig, config: TransformerConfig, ranks: ParallelState, vp_stage: int, chunks: int
) -> GPTModel:
    stage = vp_stage if chunks > 1 else None
    chunk = GPTModel(
        config,
        layers.te_layer_spec(config) if uses_te(model) else layers.local_block_spec(config, stage),
        vocab_size=arch.padded_vocab(config.tensor_model_parallel_size),
        max_sequence_length=arch.max_positions,
        pre_process=ranks.pipeline == 0 and vp_stage == 0,
        post_process=ranks.on_last_stage and vp_stage == chunks - 1,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        rope_scaling=arch.rope_scaling is not None,
        rope_scaling_factor=arch.rope_scaling or 1.0,
        vp_stage=stage,
    )
    for name, parameter in chunk.named_parameters():
        if _EXPERT.search(name):
            # Megatron sets this only with expert parallelism. Set on every layout, experts always have a separate
            # optimizer, so that checkpoints fit all layouts, and their gradients are summed over the right ranks if
            # only the tensor-parallel sizes differ.
            parameter.allreduce = False
    deliver_numbers(chunk)
    return chunk


def mark_sharded(chunks: Sequence[GPTModel], arch: Architecture) -> None:
    """Set Megatron's tensor-parallel attributes on every parameter that the weight map shards.

    In the gradient norm and in clipping, Megatron counts a parameter without the mark on tensor-parallel rank 0 only.
    Neither Transformer Engine >= 2.13 nor megatron-core < 0.19 sets it on grouped expert weights
    (NVIDIA/Megatron-LM#5916). Call it before DDP and optimizer are built; `build_chunks` does.

    Args:
        chunks: this rank's model chunks, in order.
        arch: from `read_architecture`.
    """
    parameters = weight_map(arch)
    for name, parameter in named_parameters(chunks):
        layout = parameters[name].layout
        if layout.sharded and not getattr(parameter, "tensor_model_parallel", False):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = layout.dim  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]


def uses_te(model: ModelConfig) -> bool:
    """True for Transformer Engine's layers. Their attention does not support float32 packed sequences."""
    return model.spec == "te" or (model.spec == "auto" and model.dtype == "bfloat16" and has_te())


def named_parameters(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters by global name: layers and experts are numbered over the whole model, without wrappers.

    On the last of several stages a tied output layer is named ``output_layer.weight``.
    """
    for chunk in unwrap_model(list(chunks)):
        first_layer = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
        held = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
        first_expert = held * parallel_state.get_expert_model_parallel_rank()
        for name, parameter in chunk.named_parameters():
            yield _counted_from(first_expert, _EXPERT, _counted_from(first_layer, _LAYER, name)), parameter


def _counted_from(first: int, number: re.Pattern[str], name: str) -> str:
    """Add `first` to the number in a name; a name without a number is unchanged."""
    return number.sub(lambda match: f"{match[1]}{int(match[2]) + first}", name, count=1)


def load_weights(chunks: Sequence[nn.Module], folder: Path, arch: Architecture, ranks: ParallelState) -> None:
    """Load this rank's parameters from a Hugging Face folder. Only the slices of this rank are read."""
    load_shards(
        {name: parameter.data for name, parameter in named_parameters(chunks)},
        folder,
        arch,
        tp_rank=ranks.tensor,
        tp_size=ranks.tensor_size,
        experts=ExpertShare(ranks.expert, ranks.expert_size, ranks.expert_tensor, ranks.expert_tensor_size),
    )


@torch.no_grad()
def first_non_finite(chunks: Sequence[nn.Module], arch: Architecture) -> str | None:
    """Hugging Face names of this rank's first parameter with an infinity or NaN; None if all are finite."""
    named = dict(named_parameters(chunks))
    if torch.nn.utils.get_total_norm(named.values(), norm_type=math.inf).isfinite():
        return None
    name = next(name for name, parameter in named.items() if not parameter.isfinite().all())
    return ", ".join(weight_map(arch)[name].tensors)


def output_weight(model: nn.Module) -> nn.Parameter:
    """Output matrix shard [V / TP, H] of the model's last chunk: its embedding if both are tied on one stage."""
    (gpt,) = unwrap_model([model])
    own: nn.Parameter | None = gpt.output_layer.weight
    if own is not None:
        return own
    tied: nn.Parameter = gpt.embedding.word_embeddings.weight
    return tied
