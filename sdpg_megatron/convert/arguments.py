"""Mapping between architectures and the Megatron-LM arguments that its checkpoints contain."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sdpg_megatron.architecture import Architecture, Family
from sdpg_megatron.convert.torch_dist import TorchDist
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
"""Arguments that determine weights or computation, with the equivalent keys of config.json. Other arguments are in
`_FIXED`, concern training only (dropout, dropping of tokens, lengths), or have no effect."""
_FAMILY_KEYS: Mapping[Family, Mapping[str, str]] = {
    "qwen3_moe": {"ffn_hidden_size": "moe_intermediate_size"},
    "mixtral": {
        "num_experts": "num_local_experts",
        "moe_ffn_hidden_size": "intermediate_size",
        "moe_router_pre_softmax": "model_type",
    },
}
"""Keys of config.json that differ in a family."""
_CONDITIONS = {
    "num_query_groups": "group_query_attention",
    "rope_scaling_factor": "use_rope_scaling",
    "num_experts": "num_experts",
    "moe_ffn_hidden_size": "num_experts",
    "moe_router_topk": "num_experts",
    "moe_router_pre_softmax": "num_experts",
}
"""Arguments that apply only if another argument is true, as those of `_FIXED_FOR_EXPERTS` do with "num_experts"."""
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None, (-1, -1), (-1, 0)),
    "no_rope_freq": (None, 0),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "apply_residual_connection_post_layernorm": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "use_mup": (False,),
}
"""Arguments without an equivalent in config.json, with the values that all families have: first Megatron-LM's default,
then equivalent values."""
_FIXED_FOR_EXPERTS: Mapping[str, tuple[Any, ...]] = {
    "moe_layer_freq": (1,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_apply_probs_on_input": (False,),
}
_LIST_VALUED = {"no_rope_freq", "moe_layer_freq", "moe_router_load_balancing_type"}
"""Arguments of these that may be lists, of a value for each layer or of several losses."""


def model_arguments(arch: Architecture) -> dict[str, Any]:
    """Megatron-LM's arguments for an architecture."""
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
        "add_position_embedding": True,  # Megatron-LM's default, which its loader compares
        "use_rotary_position_embeddings": True,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "num_experts": experts.count if experts else None,
        "moe_ffn_hidden_size": arch.ffn_size if experts else None,
        "moe_router_topk": experts.per_token if experts else 2,  # Megatron-LM's default
        "moe_router_pre_softmax": experts is not None and not experts.normalized,
    }


def checkpoint_arguments(arch: Architecture, dtype: torch.dtype) -> Namespace:
    """Megatron-LM's arguments for a checkpoint with weights only, without training state."""
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
    """Megatron-LM's arguments in a checkpoint; empty if it has none. Raises `CheckpointError` on damage."""
    found = checkpoint.common().get("args")
    return vars(found) if isinstance(found, Namespace | SimpleNamespace) else {}


@dataclass(frozen=True, slots=True)
class ArgumentConflict:
    """An argument of Megatron-LM that contradicts an architecture."""

    argument: str
    found: Any
    expected: Any
    key: str | None
    """Key of config.json with the expected value; None if all supported families have it."""


def check_arguments(found: Mapping[str, Any], arch: Architecture, where: str) -> None:
    """Compare a checkpoint's arguments with an architecture; missing arguments are not checked.

    Raises:
        ConversionError: names the first argument that contradicts config.json, with its key, or that no supported
            family has.
    """
    for conflict in conflicts(found, arch):
        if conflict.key is not None:
            expected = f"{conflict.expected!r}, as in config.json ({conflict.key})"
            fix = "convert with the config.json that the model was trained with"
        else:
            expected = f"{conflict.expected!r}, as in every supported family ({arch.family})"
            fix = "this model cannot be converted: config.json of these families cannot express it"
        raise ConversionError(f"{where}: {conflict.argument}", repr(conflict.found), expected, fix)


def conflicts(found: Mapping[str, Any], arch: Architecture) -> Iterator[ArgumentConflict]:
    """Arguments of Megatron-LM that contradict an architecture. Missing arguments and None are not checked."""
    expected, keys = model_arguments(arch), {**CONFIG_KEYS, **_FAMILY_KEYS.get(arch.family, {})}
    for argument, key in keys.items():
        value = found.get(argument)
        feature = _CONDITIONS.get(argument)
        if value is None or (feature and not found.get(feature)):
            continue
        if argument == "ffn_hidden_size" and arch.experts and found.get("moe_ffn_hidden_size"):
            continue  # for dense layers, which the model does not have
        if value != expected[argument]:
            yield ArgumentConflict(argument, value, expected[argument], key)
    for argument, allowed in _fixed_arguments(found, arch).items():
        value = found.get(argument)
        one_by_one = argument in _LIST_VALUED and isinstance(value, list | tuple)
        if value is not None and not all(_is_one_of(each, allowed) for each in (value if one_by_one else [value])):
            yield ArgumentConflict(argument, value, allowed[0], None)


def _fixed_arguments(found: Mapping[str, Any], arch: Architecture) -> dict[str, tuple[Any, ...]]:
    """Values that every supported family has; others cannot be computed."""
    scale, groups = arch.head_dim**-0.5, found.get("moe_router_num_groups")
    fixed = dict(_FIXED)
    if not _is_close(found.get("softmax_scale"), scale):
        fixed["softmax_scale"] = (None,)
    if found.get("num_experts"):
        fixed |= {**_FIXED_FOR_EXPERTS, "moe_router_group_topk": (None, 0, groups)}  # all groups: no restriction
    return fixed


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return (tuple(value) if isinstance(value, list) else value) in allowed


def _is_close(value: Any, expected: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, expected, rel_tol=1e-6)
