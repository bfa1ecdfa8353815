"""Model architecture from a Hugging Face config.json, and checks of parallel layouts against it.

Keys that the Megatron model would compute differently from Hugging Face are refused by name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from sdpg_megatron.config import ModelConfig, ParallelConfig, RunConfig, SGLangConfig
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.hf_files import read_config

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"]

_CLASSES: Mapping[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}

_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_jitter_noise": 0.0,
    "num_shared_experts": 0,
    "n_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
    # Scales, soft-caps and biases of other families. transformers' classes of the supported families ignore them;
    # servers may not.
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "logits_mup_width_multiplier", "lm_head_multiplier", "output_multiplier"), 1
    ),
    **dict.fromkeys(("embedding_multiplier", "embedding_scale", "scale_emb", "residual_multiplier"), 1),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "output_logit_soft_cap"), None),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base"), None),
    **dict.fromkeys(("clip_qkv", "logit_bias"), None),
    "lm_head_bias": False,
}
"""Keys with their only supported value. An absent or null key is equivalent to it."""

FUSION_KERNELS = "fused_weight_gradient_mlp_cuda"
"""Extension module of apex. Megatron's output layer needs it for gradient accumulation fusion, even if the other layers
are Transformer Engine's."""

LLAMA3_ROPE: Mapping[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rotary parameters of Llama 3 besides the factor, which are constants in megatron-core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Experts of a mixture-of-experts layer: feed-forward networks with `Architecture.ffn_size` columns each."""

    count: int
    """Number of experts per layer."""
    per_token: int
    """Number of experts per token, selected by the largest router logits. No token is dropped."""
    normalized: bool
    """True if the weights of a token sum to 1 over its experts; otherwise they are the softmax over all experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Dimensions and variants of a decoder with RMSNorm, rotary positions and SwiGLU feed-forward networks."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Columns of the feed-forward network of a layer, or of one expert."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: float | None
    """Llama 3's scaling factor of long rotary wavelengths; None for plain rotary positions."""
    tied_embeddings: bool
    """True if output layer and input embedding share their weights."""
    experts: Experts | None = None
    """Experts of every layer; None for a dense model."""

    @property
    def qkv_bias(self) -> bool:
        """True if the query, key and value projections have biases."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """True if queries and keys are normalized by RMSNorm over the head dimension."""
        return self.family in ("qwen3", "qwen3_moe")

    def padded_vocab(self, tensor: int, multiple: int = 128) -> int:
        """Number of embedding rows in Megatron: the next multiple of `multiple` * `tensor`."""
        unit = multiple * tensor
        return -(-self.vocab_size // unit) * unit


def read_architecture(folder: Path) -> Architecture:
    """Read ``folder/config.json``, written by transformers 4 or 5.

    Raises:
        ConfigError: an unreadable file, a missing dimension, or an unsupported value.
    """
    config = read_config(folder)
    _check_values(config)
    family = _family(config)
    for key, supported in _FIXED.items():
        if config.get(key) not in (None, supported):
            raise _unsupported(key, config[key], repr(supported))
    if family == "mixtral" and config.get("sliding_window"):
        raise _unsupported("sliding_window", config["sliding_window"], "null")
    windowed = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windowed:
        raise _unsupported("layer_types", windowed[0], "full_attention in every layer")
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    rope = _rope_parameters(config, 1e6 if family == "mixtral" else 1e4)
    return Architecture(
        family=family,
        num_layers=_integer(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=_integer(config, "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads"),
        head_dim=int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
        vocab_size=_integer(config, "vocab_size"),
        max_positions=_integer(config, "max_position_embeddings"),
        rms_eps=float(config.get("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6)),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        experts=_experts(config, family),
    )


def check_parallel(arch: Architecture, parallel: ParallelConfig) -> None:
    """Check that the model can be sharded as `parallel` requires.

    Raises:
        ConfigError: names the field, the size that it must divide, and the valid values.
    """
    _check_tensor(arch, parallel)
    _check_experts(arch, parallel)
    pipeline, virtual, layers = parallel.pipeline, parallel.virtual_pipeline, arch.num_layers
    if layers % pipeline:
        raise _indivisible(
            "parallel.pipeline", pipeline, f"a divisor of the model's {layers} layers", _divisors(layers)
        )
    if virtual and layers % (pipeline * virtual):
        works = [v for v in _divisors(layers // pipeline) if v > 1]
        expected = f"a divisor of the {layers // pipeline} layers of each pipeline stage"
        raise _indivisible("parallel.virtual_pipeline", virtual, expected, works or ["null"])


def _check_tensor(arch: Architecture, parallel: ParallelConfig) -> None:
    shared = {"attention heads": arch.num_heads, "key-value heads": arch.num_kv_heads}
    if arch.experts is None:
        shared["feed-forward columns"] = arch.ffn_size
    for noun, size in shared.items():
        if size % parallel.tensor:
            works = [t for t in _divisors(arch.num_kv_heads) if all(size % t == 0 for size in shared.values())]
            raise _indivisible("parallel.tensor", parallel.tensor, f"a divisor of the model's {size} {noun}", works)


def check_served(arch: Architecture, served: SGLangConfig) -> None:
    """Check that SGLang can shard the model over the ranks of a server. Raises `ConfigError`."""
    heads, pairs = arch.num_heads, arch.num_kv_heads
    columns = arch.ffn_size if arch.experts is None else 0

    def fits(tensor: int) -> bool:
        return not (heads % tensor or columns % tensor) and not (pairs % tensor and tensor % pairs)

    if not fits(served.tensor):
        expected = f"a divisor of the model's {heads} attention heads"
        expected += f" and {columns} feed-forward columns" if columns else ""
        expected += f", and a divisor or multiple of its {pairs} key-value heads"
        works = [tensor for tensor in _divisors(heads) if fits(tensor)]
        raise _indivisible("rollout.sglang.tensor", served.tensor, expected, works)


def _check_experts(arch: Architecture, parallel: ParallelConfig) -> None:
    if arch.experts is None:
        for field, found, none in (
            ("expert", parallel.expert, 1),
            ("expert_tensor", parallel.expert_tensor, None),
            ("dispatcher", parallel.dispatcher, "alltoall"),
        ):
            if found != none:
                expected = f"{'null' if none is None else none} with a dense model ({arch.family})"
                raise ConfigError(f"parallel.{field}", found, expected, "remove it")
        return
    count, size = arch.experts.count, parallel.expert_tensor_size
    if count % parallel.expert:
        expected = f"a divisor of the {count} experts of a layer"
        raise _indivisible("parallel.expert", parallel.expert, expected, _divisors(count))
    if arch.ffn_size % size:
        field = "parallel.tensor" if parallel.expert_tensor is None else "parallel.expert_tensor"
        expected = f"a divisor of an expert's {arch.ffn_size} feed-forward columns"
        raise _indivisible(field, size, expected, _divisors(arch.ffn_size))
    if parallel.tensor > 1 and not parallel.sequence:
        expected = "true for a mixture of experts on several tensor-parallel ranks"
        raise ConfigError("parallel.sequence", False, expected, "set it, or parallel.tensor to 1")


def check_model(arch: Architecture, model: ModelConfig, *, replay_routing: bool = False) -> None:
    """Check that the model and the installed modules support the configuration. Raises `ConfigError`."""
    if arch.experts is None and replay_routing:
        raise ConfigError("rollout.replay_routing", True, f"false with a dense model ({arch.family})", "remove it")
    for field in ("router_aux_loss", "router_z_loss"):
        if arch.experts is None and (found := getattr(model, field)):
            raise ConfigError(f"model.{field}", found, f"0 with a dense model ({arch.family})", "remove it")
    if model.gradient_accumulation_fusion and importlib.util.find_spec(FUSION_KERNELS) is None:
        expected = f"false without the module {FUSION_KERNELS}"
        fix = "install apex with its C++ and CUDA extensions, or remove it"
        raise ConfigError("model.gradient_accumulation_fusion", True, expected, fix)


def check_lengths(arch: Architecture, config: RunConfig) -> None:
    """Check sequence lengths against the model's positions, and top k against its vocabulary. Raises `ConfigError`."""
    top_k = config.objective.top_k
    if top_k is not None and top_k > arch.vocab_size:
        expected = f"at most the model's {arch.vocab_size} tokens"
        raise ConfigError("objective.top_k", top_k, expected, "lower it, or set it to null for the whole vocabulary")
    response = max(config.rollout.max_response_tokens, config.eval.max_response_tokens or 0)
    longest = config.data.max_prompt_tokens + response
    if longest > arch.max_positions:
        raise ConfigError(
            "data.max_prompt_tokens + response tokens",
            f"{config.data.max_prompt_tokens} + {response}",
            f"at most the model's {arch.max_positions} positions",
            "lower data.max_prompt_tokens, rollout.max_response_tokens or eval.max_response_tokens",
        )
    if config.max_teacher_tokens + config.rollout.max_response_tokens > arch.max_positions:
        raise ConfigError(
            "data.max_peer_tokens + response tokens",
            f"{config.max_teacher_tokens} + {config.rollout.max_response_tokens}",
            f"at most the model's {arch.max_positions} positions",
            "lower data.max_peer_tokens or rollout.max_response_tokens",
        )


_MOST_LAYERS = 10_000
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "head_dim": ((int, NoneType), "a positive integer"),
    "rms_norm_eps": ((int, float), "a positive number"),
    "rope_theta": ((int, float), "a positive number"),
    "factor": ((int, float), "a positive number"),
    "rope_parameters": ((dict, NoneType), "an object"),
    "rope_scaling": ((dict, NoneType), "an object"),
    "layer_types": ((list, NoneType), "a list"),
    "tie_word_embeddings": ((bool, NoneType), "true or false"),
}
"""Types of optional keys, with their description for errors."""


def _check_values(config: Mapping[str, Any]) -> None:
    """Refuse invalid types and dimensions before they are used. Raises `ConfigError`."""
    for section in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        for key, value in section.items() if isinstance(section, dict) else ():
            if key in _KINDS and not _fits(value, _KINDS[key][0]):
                raise ConfigError(f"config.json: {key}", value, _KINDS[key][1], f"correct {key} in config.json")
    if any(not isinstance(kind, str) for kind in config.get("layer_types") or ()):
        raise _unsupported("layer_types", config["layer_types"], "names")
    heads, kv_heads = _integer(config, "num_attention_heads"), _integer(config, "num_key_value_heads")
    for key, found, wrong, expected in (
        ("num_key_value_heads", kv_heads, heads % kv_heads, f"a divisor of the {heads} attention heads"),
        ("num_attention_heads", heads, heads > _integer(config, "hidden_size"), "no more than hidden_size"),
        ("num_hidden_layers", layers := _integer(config, "num_hidden_layers"), layers > _MOST_LAYERS, "fewer layers"),
    ):
        if wrong:
            raise ConfigError(f"config.json: {key}", found, expected, f"correct {key} in config.json")


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    return type(value) in kinds and 0 < value < float("inf")


def _family(config: Mapping[str, Any]) -> Family:
    found = config.get("model_type")
    for family, class_name in _CLASSES.items():
        if found == family:
            names = config.get("architectures") or [class_name]
            if names != [class_name]:
                raise _unsupported("architectures", names, repr([class_name]))
            return family
    raise _unsupported("model_type", found, f"one of {', '.join(_CLASSES)}")


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:  # bool is a subclass of int
        raise ConfigError(f"config.json: {key}", value, "a positive integer", f"set {key} in the model's config.json")
    return value


def _experts(config: Mapping[str, Any], family: Family) -> Experts | None:
    if family not in ("qwen3_moe", "mixtral"):
        return None
    # transformers 4 calls Qwen3's num_experts; both call Mixtral's num_local_experts.
    count = _integer(config, "num_experts" if "num_experts" in config else "num_local_experts")
    per_token, normalized = _integer(config, "num_experts_per_tok"), True
    if family == "qwen3_moe":
        normalized = bool(config.get("norm_topk_prob", False))
    least = 2 if normalized else 1  # a single normalized weight is 1: the router would never learn
    if not least <= per_token <= count:
        raise _unsupported("num_experts_per_tok", per_token, f"{least} to the {count} experts")
    return Experts(count=count, per_token=per_token, normalized=normalized)


def _rope_parameters(config: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` of transformers 4."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", default_theta))
    return rope


def _rope_scaling(rope: Mapping[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise _unsupported("rope_type", kind, "'default' or 'llama3'")
    for key, built_in in LLAMA3_ROPE.items():
        if rope.get(key) != built_in:
            raise _unsupported(key, rope.get(key), f"{built_in}, as megatron-core computes it")
    if not isinstance(rope.get("factor"), int | float):
        raise ConfigError("config.json: factor", None, "a number with rope_type 'llama3'", "set factor")
    return float(rope["factor"])


def _unsupported(key: str, found: object, expected: str) -> ConfigError:
    return ConfigError(f"config.json: {key}", found, expected, "choose a model of a supported architecture")


def _indivisible(field: str, found: int, expected: str, works: list[Any]) -> ConfigError:
    return ConfigError(field, found, expected, f"use one of: {', '.join(map(str, works))}")


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
