"""Check that the installed transformers computes with the settings of config.json.

A version that does not know a key silently uses its own default.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from sdpg_megatron.architecture import LLAMA3_ROPE, Architecture
from sdpg_megatron.errors import ConfigError


def check_reading(folder: Path, arch: Architecture) -> None:
    """Compare transformers' reading of a folder's config.json with the architecture read from it.

    Includes the rotary frequencies of a model with this configuration; no model is built.

    Raises:
        ConfigError: they differ, or transformers cannot read the file.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise differs(folder, "config.json", " ".join(str(error).split()), "a configuration it can read") from error
    for key, expected in expected_settings(arch).items():
        if (found := getattr(config, key, expected)) != expected:
            raise differs(folder, key, found, expected)
    rotary = _rotary_class(config)(config=config)
    if rotary.attention_scaling != 1:
        raise differs(folder, "attention scaling of the rotary embedding", rotary.attention_scaling, 1)
    expected_F = inverse_frequencies(arch)
    found_F = rotary.inv_freq.double()
    if found_F.shape != expected_F.shape or not torch.allclose(found_F, expected_F, rtol=1e-5, atol=0):
        found = f"base {_base(found_F):.6g} (slowest frequency {float(found_F[-1]):.6g})"
        scaling = f", factor {arch.rope_scaling:g}" if arch.rope_scaling else ""
        expected = f"base {arch.rope_theta:.6g}{scaling} (slowest frequency {float(expected_F[-1]):.6g})"
        raise differs(folder, "rotary embedding", found, expected)


def inverse_frequencies(arch: Architecture) -> Tensor:
    """Rotary angles per position, float64 [head size / 2], with Llama 3's scaling if the architecture has it."""
    exponents_F = torch.arange(0, arch.head_dim, 2, dtype=torch.float64) / arch.head_dim
    plain_F: Tensor = arch.rope_theta**-exponents_F
    if arch.rope_scaling is None:
        return plain_F
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    turns_F = LLAMA3_ROPE["original_max_position_embeddings"] * plain_F / (2 * math.pi)
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return plain_F * (kept_F + (1 - kept_F) / arch.rope_scaling)


def expected_settings(arch: Architecture) -> dict[str, Any]:
    """Attributes of a transformers configuration that affect the computation."""
    found: dict[str, Any] = {
        "model_type": arch.family,
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "vocab_size": arch.vocab_size,
        "rms_norm_eps": arch.rms_eps,
        "tie_word_embeddings": arch.tied_embeddings,
    }
    if arch.experts is not None:
        found["num_experts_per_tok"] = arch.experts.per_token
        if arch.family == "qwen3_moe":
            found["norm_topk_prob"] = arch.experts.normalized
    return found


def _rotary_class(config: Any) -> Any:
    """Rotary embedding class in the module of a configuration's model class."""
    module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    return next(found for name, found in vars(module).items() if name.endswith("RotaryEmbedding"))


def _base(frequencies_F: Tensor) -> float:
    """Base of plain rotary frequencies."""
    return float(frequencies_F[1] ** -len(frequencies_F)) if len(frequencies_F) > 1 else math.nan


def differs(
    folder: Path, what: str, found: object, expected: object, version: str = transformers.__version__
) -> ConfigError:
    """Error for a transformers version that reads a setting differently from the trainer."""
    return ConfigError(
        f"{folder / 'config.json'}: {what}",
        found,
        f"{expected}; transformers {version} does not read the file as the trainer does",
        "install a transformers that does (version 5 reads files of 4 and 5)",
    )
