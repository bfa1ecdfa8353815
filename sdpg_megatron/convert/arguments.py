"""An architecture in the words of Megatron-LM's arguments, which its checkpoints carry."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.checkpoint.torch_dist import TorchDist
from sdpg_megatron.errors import ConversionError

CONFIG_KEYS: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "use_rope_scaling": "rope_parameters",
    "rope_scaling_factor": "rope_parameters.factor",
    "untie_embeddings_and_output_weights": "tie_word_embeddings",
    "add_qkv_bias": "model_type",
    "qk_layernorm": "model_type",
    "vocab_size": "vocab_size",
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_pre_softmax": "norm_topk_prob",
    "swiglu": "hidden_act",
    "squared_relu": "hidden_act",
    "add_bias_linear": "mlp_bias",
    "normalization": "model_type",
    "apply_layernorm_1p": "model_type",
    "position_embedding_type": "model_type",
    "rotary_percent": "model_type",
    "rotary_interleaved": "model_type",
}
"""Arguments that say what the weights are and what is computed from them, and the keys of config.json that say the
same. The others are of training (dropout, lengths), or make no difference."""
_OF_A_FEATURE = {
    "num_query_groups": "group_query_attention",
    "rope_scaling_factor": "use_rope_scaling",
    "moe_ffn_hidden_size": "num_experts",
    "moe_router_topk": "num_experts",
    "moe_router_pre_softmax": "num_experts",
}
"""Arguments that mean something only where another one is true."""


def model_arguments(arch: Architecture) -> dict[str, Any]:
    """What Megatron-LM calls the parts of an architecture."""
    experts = arch.experts
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.num_heads,
        "group_query_attention": True,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "norm_epsilon": arch.rms_eps,
        "rotary_base": arch.rope_theta,
        "use_rope_scaling": arch.rope_scaling is not None,
        "rope_scaling_factor": arch.rope_scaling or 1.0,
        "untie_embeddings_and_output_weights": not arch.tied_embeddings,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_positions,
        "normalization": "RMSNorm",
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # Megatron-LM's default, which it compares
        "use_rotary_position_embeddings": True,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "num_experts": experts.count if experts else None,
        "moe_ffn_hidden_size": arch.ffn_size if experts else None,
        "moe_router_topk": experts.per_token if experts else 2,  # Megatron-LM's default
        "moe_router_pre_softmax": experts is not None and not experts.normalized,
    }


def checkpoint_arguments(arch: Architecture, dtype: torch.dtype) -> Namespace:
    """The arguments of a checkpoint that has a model and nothing to continue training from."""
    return Namespace(
        **model_arguments(arch),
        seq_length=arch.max_positions,
        make_vocab_size_divisible_by=128,
        padded_vocab_size=arch.padded_vocab(1),
        tokenizer_type="HuggingFaceTokenizer",
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
    )


def arguments_of(checkpoint: TorchDist) -> dict[str, Any]:
    """Megatron-LM's arguments in a checkpoint; empty where it has none. Raises `CheckpointError` on damage."""
    found = checkpoint.common().get("args")
    return vars(found) if isinstance(found, Namespace | SimpleNamespace) else {}


def check_arguments(found: Mapping[str, Any], arch: Architecture, where: str) -> None:
    """Hold a checkpoint's arguments against an architecture, field by field; those that are not there say nothing.

    Raises:
        ConversionError: naming the first argument that differs, and the key of config.json that it contradicts.
    """
    expected = model_arguments(arch)
    for argument, key in CONFIG_KEYS.items():
        value = found.get(argument)
        feature = _OF_A_FEATURE.get(argument)
        if value is None or (feature and not found.get(feature)):
            continue
        if value != expected[argument]:
            raise ConversionError(
                f"{where}: {argument}",
                repr(value),
                f"{expected[argument]!r}, which config.json says ({key})",
                "convert with the config.json that the model was trained with",
            )
