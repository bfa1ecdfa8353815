"""A checkpoint's arguments, held against config.json and against what the supported families compute."""

from __future__ import annotations

import dataclasses
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpg_megatron.architecture import Architecture, Experts, read_architecture
from sdpg_megatron.convert.arguments import check_arguments, checkpoint_arguments
from sdpg_megatron.errors import ConversionError

CONFIGS = Path(__file__).parents[1] / "fixtures/configs"

LEFT: dict[str, Any] = {
    "add_position_embedding": True,
    "apply_query_key_layer_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "activation_func_clamp_value": None,
    "attention_dropout": 0.1,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "hidden_dropout": 0.1,
    "is_hybrid_model": False,
    "kv_lora_rank": 32,
    "linear_attention_freq": None,
    "moe_apply_probs_on_input": False,
    "moe_aux_loss_coeff": 0.0,
    "moe_expert_capacity_factor": None,
    "moe_ffn_hidden_size": None,
    "moe_input_jitter_eps": None,
    "moe_layer_freq": 1,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_dtype": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_group_topk": None,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_num_groups": None,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_token_drop_policy": "probs",
    "mscale": 1.0,
    "mtp_loss_scaling_factor": 0.1,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_experts": None,
    "openai_gelu": False,
    "qk_l2_norm": False,
    "quick_geglu": False,
    "rope_scaling_factor": 8.0,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_scaling_factor": 1.0,
    "rotary_seq_len_interpolation_factor": None,
    "softmax_type": "vanilla",
    "squared_relu": False,
    "use_rope_scaling": False,
    "use_rotary_position_embeddings": False,
    "window_attn_skip_freq": None,
    "window_size": None,
}
"""As Megatron-LM's command line leaves them."""


def told(arch: Architecture, **arguments: Any) -> dict[str, Any]:
    """What Megatron-LM's command line makes of a script for this model."""
    scripted = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.num_heads,
        "group_query_attention": True,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "norm_epsilon": arch.rms_eps,
        "position_embedding_type": "rope",
        "rotary_base": int(arch.rope_theta),
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "untie_embeddings_and_output_weights": not arch.tied_embeddings,
    }
    return vars(Namespace(**{**LEFT, **scripted, **arguments}))


MIXTRAL = Architecture(
    family="mixtral", num_layers=2, hidden_size=64, ffn_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=300, max_positions=128, rms_eps=1e-5, rope_theta=1e6, rope_scaling=None, tied_embeddings=False,
    experts=Experts(count=4, per_token=2, normalized=True),
)  # fmt: skip


QWEN3 = dataclasses.replace(
    MIXTRAL, family="qwen3", num_layers=4, head_dim=32, rms_eps=1e-6, rope_theta=1e4, experts=None
)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_layers", 8, r"args: num_layers: found 8, expected 4, as in config\.json \(num_hidden_layers\)"),
        ("num_query_groups", 4, r"num_query_groups: found 4, expected 2, .*num_key_value_heads"),
        ("rotary_base", 500000, r"rotary_base: found 500000, expected 10000\.0, .*rope_theta"),
        ("untie_embeddings_and_output_weights", False, "tie_word_embeddings"),
        ("norm_epsilon", 1e-5, "rms_norm_eps"),
        ("rotary_interleaved", True, r"rotary_interleaved: found True, expected False, .*model_type"),
        ("rotary_percent", 0.5, r"rotary_percent: found 0\.5, expected 1\.0"),
        ("normalization", "LayerNorm", r"normalization: found 'LayerNorm', expected 'RMSNorm'"),
        ("apply_layernorm_1p", True, "apply_layernorm_1p"),
        ("position_embedding_type", "none", r"position_embedding_type: found 'none', expected 'rope'"),
        ("squared_relu", True, "hidden_act"),
        ("add_bias_linear", True, "mlp_bias"),
    ],
)
def test_arguments_that_contradict_config_json_are_named(argument: str, value: object, message: str) -> None:
    arguments = vars(checkpoint_arguments(QWEN3, torch.float32))
    check_arguments(arguments, QWEN3, "args")
    with pytest.raises(ConversionError, match=message):
        check_arguments({**arguments, argument: value}, QWEN3, "args")


@pytest.mark.parametrize("name", ["Qwen3-1.7B", "Qwen3-8B", "Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct"])
def test_what_megatron_lm_leaves_as_it_is_passes(tmp_path: Path, name: str) -> None:
    shutil.copyfile(CONFIGS / f"{name}.json", tmp_path / "config.json")
    arch = read_architecture(tmp_path)
    check_arguments(told(arch, use_rope_scaling=arch.rope_scaling is not None), arch, "args")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"moe_layer_freq": [1] * 48, "moe_router_load_balancing_type": ["aux_loss", "none"]},
        {"moe_router_group_topk": 1, "moe_router_num_groups": 1, "moe_router_topk_scaling_factor": 1.0},
        {"softmax_scale": 128**-0.5, "window_size": [-1, -1], "mtp_num_layers": 0, "no_rope_freq": [0] * 48},
    ],
)
def test_mixtures_as_megatron_lm_has_them(tmp_path: Path, more: dict[str, Any]) -> None:
    shutil.copyfile(CONFIGS / "Qwen3-30B-A3B.json", tmp_path / "config.json")
    arch = read_architecture(tmp_path)
    experts = {"num_experts": 128, "moe_ffn_hidden_size": 768, "moe_router_topk": 8, "ffn_hidden_size": 6144}
    check_arguments(told(arch, **experts, **more), arch, "args")
    for changed, message in (
        ({"moe_ffn_hidden_size": 640}, r"moe_ffn_hidden_size: found 640, expected 768, .*\(moe_intermediate_size\)"),
        ({"moe_ffn_hidden_size": None}, r"ffn_hidden_size: found 6144, expected 768, .*\(moe_intermediate_size\)"),
    ):
        with pytest.raises(ConversionError, match=message):
            check_arguments(told(arch, **{**experts, **more, **changed}), arch, "args")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"moe_ffn_hidden_size": 80}, r"moe_ffn_hidden_size: found 80, expected 96, .*\(intermediate_size\)"),
        ({"ffn_hidden_size": 80}, r"args: ffn_hidden_size: found 80, expected 96, .*\(intermediate_size\)"),
        ({"num_experts": 8}, r"num_experts: found 8, expected 4, .*\(num_local_experts\)"),
    ],
)
def test_so_is_mixtral(changed: dict[str, Any], message: str) -> None:
    check_arguments(told(MIXTRAL, num_experts=4), MIXTRAL, "args")
    check_arguments(told(MIXTRAL, num_experts=4, moe_ffn_hidden_size=96, ffn_hidden_size=256), MIXTRAL, "args")
    with pytest.raises(ConversionError, match=message):
        check_arguments(told(MIXTRAL, **{"num_experts": 4, **changed}), MIXTRAL, "args")


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("multi_latent_attention", True, "False"),
        ("experimental_attention_variant", "gated_delta_net", "None"),
        ("attention_output_gate", True, "False"),
        ("qk_l2_norm", True, "False"),
        ("softmax_scale", 0.5, "None"),
        ("softmax_type", "off-by-one", "'vanilla'"),
        ("window_size", (128, 0), "None"),
        ("no_rope_freq", 4, "None"),
        ("no_rope_freq", [0, 1], "None"),
        ("rotary_seq_len_interpolation_factor", 4, "None"),
        ("apply_residual_connection_post_layernorm", True, "False"),
        ("glu_linear_offset", 1.0, r"0\.0"),
        ("activation_func_clamp_value", 7.0, "None"),
        ("mtp_num_layers", 1, "None"),
        ("heterogeneous_layers_config_path", "layers.json", "None"),
        ("heterogeneous_layers_config_encoded_json", "{}", "None"),
        ("use_mup", True, "False"),
        ("moe_layer_freq", 2, "1"),
        ("moe_layer_freq", [0, 1], "1"),
        ("moe_router_score_function", "sigmoid", "'softmax'"),
        ("moe_router_topk_scaling_factor", 2.5, "None"),
        ("moe_router_enable_expert_bias", True, "False"),
        ("moe_router_group_topk", 1, "None"),
        ("moe_router_load_balancing_type", "sinkhorn", "'aux_loss'"),
        ("moe_router_load_balancing_type", ["none", "sinkhorn"], "'aux_loss'"),
        ("moe_shared_expert_intermediate_size", 64, "None"),
        ("moe_apply_probs_on_input", True, "False"),
    ],
)
def test_arguments_that_no_supported_family_has_are_named(argument: str, value: object, expected: str) -> None:
    found = re.escape(repr(value))
    with pytest.raises(ConversionError, match=rf"args: {argument}: found {found}, expected {expected}, as in every"):
        check_arguments(told(MIXTRAL, num_experts=4, **{argument: value}), MIXTRAL, "args")


def test_arguments_of_experts_say_nothing_without_experts() -> None:
    check_arguments(told(QWEN3, moe_layer_freq=2, moe_router_score_function="sigmoid", num_experts=0), QWEN3, "args")
