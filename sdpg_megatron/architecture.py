"""What a model is made of, read from its Hugging Face config.json, and the parallel layouts it can take.

Whatever the Megatron model would compute differently from the Hugging Face one is refused here, by the name of the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from sdpg_megatron.config import ParallelConfig, RunConfig
from sdpg_megatron.errors import ConfigError

Family = Literal["llama", "qwen2", "qwen3"]

_CLASSES: Mapping[Family, str] = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Keys with the only value that is supported; a key that is absent has it."""


_LLAMA3: Mapping[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Llama 3's rotary parameters besides the factor: megatron-core has them built in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Dimensions and variants of a dense decoder with RMSNorm, rotary positions and a SwiGLU feed-forward."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float
    rope_theta: float
    rope_scaling: float | None
    """Factor by which Llama 3 stretches the longer rotary wavelengths; None for plain rotary positions."""
    tied_embeddings: bool
    """The output layer is the input embedding."""

    @property
    def qkv_bias(self) -> bool:
        """The query, key and value projections have biases."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Queries and keys pass through an RMSNorm over the head dimension."""
        return self.family == "qwen3"

    def padded_vocab(self, tensor: int, multiple: int = 128) -> int:
        """Rows of the embedding under Megatron: the next multiple of `multiple` * `tensor`."""
        unit = multiple * tensor
        return -(-self.vocab_size // unit) * unit


def read_architecture(folder: Path) -> Architecture:
    """Read ``folder/config.json``, as written by transformers 4 or 5.

    Raises:
        ConfigError: the file cannot be read, lacks a dimension, or asks for something that is not supported.
    """
    config = _read_json(folder / "config.json")
    _check_values(config)
    family = _family(config)
    for key, supported in _FIXED.items():
        if config.get(key, supported) != supported:
            raise _unsupported(key, config[key], repr(supported))
    windowed = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windowed:
        raise _unsupported("layer_types", windowed[0], "full_attention in every layer")
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    rope = _rope_parameters(config)
    return Architecture(
        family=family,
        num_layers=_integer(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_size=_integer(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads"),
        head_dim=int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
        vocab_size=_integer(config, "vocab_size"),
        max_positions=_integer(config, "max_position_embeddings"),
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def check_parallel(arch: Architecture, parallel: ParallelConfig) -> None:
    """Check that the model can be cut as `parallel` says.

    Raises:
        ConfigError: naming the field, what it must divide, and the values that would work.
    """
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    for noun, size in (
        ("attention heads", arch.num_heads),
        ("key-value heads", arch.num_kv_heads),
        ("feed-forward columns", arch.ffn_size),
    ):
        if size % tensor:
            works = [t for t in _divisors(arch.num_kv_heads) if arch.num_heads % t == 0 and arch.ffn_size % t == 0]
            raise _indivisible("parallel.tensor", tensor, f"a divisor of the model's {size} {noun}", works)
    layers = arch.num_layers
    if layers % pipeline:
        raise _indivisible(
            "parallel.pipeline", pipeline, f"a divisor of the model's {layers} layers", _divisors(layers)
        )
    if virtual and layers % (pipeline * virtual):
        works = [v for v in _divisors(layers // pipeline) if v > 1]
        expected = f"a divisor of the {layers // pipeline} layers of each pipeline stage"
        raise _indivisible("parallel.virtual_pipeline", virtual, expected, works or ["null"])


def check_lengths(arch: Architecture, config: RunConfig) -> None:
    """Check that the longest prompt and response fit the positions that the model has. Raises `ConfigError`."""
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "model.path", str(path), "a Hugging Face folder with a config.json", error.strerror or "check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("model.path", f"{path}: {error}", "valid JSON", "download the file again") from error
    if not isinstance(config, dict):
        raise ConfigError("model.path", f"{path}: a {type(config).__name__}", "a JSON object", "check the file")
    return config


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
"""What keys may be that need not be there."""


def _check_values(config: Mapping[str, Any]) -> None:
    """Refuse values that no model has, before anything is computed from them. Raises `ConfigError`."""
    for place in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        for key, value in place.items() if isinstance(place, dict) else ():
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
    if type(value) is not int or value < 1:  # true and false are integers, too
        raise ConfigError(f"config.json: {key}", value, "a positive integer", f"set {key} in the model's config.json")
    return value


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5; of older files, `rope_scaling` with the `rope_theta` beside it."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _rope_scaling(rope: Mapping[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise _unsupported("rope_type", kind, "'default' or 'llama3'")
    for key, built_in in _LLAMA3.items():
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
