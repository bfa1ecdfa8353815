"""slime around its function paths: what the hooks and slime call of each other, and slime's arguments and data.

`slime_model.py` models it; `slime_real.py` takes slime's own modules from the checkout that SDPG_SLIME names.
"""

from __future__ import annotations

import ast
import importlib
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CHECKOUT = "SDPG_SLIME"
TRAIN_KEYS = (
    *("tokens", "multimodal_train_inputs", "packed_seq_params", "total_lengths", "response_lengths", "loss_masks"),
    *("log_probs", "ref_log_probs", "values", "advantages", "returns", "rollout_log_probs", "teacher_log_probs"),
    "rollout_mask_sums",
)
"""Fields that reach the loss function (slime's `train_one_step`)."""
SHIPPED = (
    *("tokens", "multimodal_train_inputs", "response_lengths", "rewards", "truncated", "loss_masks", "round_number"),
    *("sample_indices", "rollout_ids", "rollout_mask_sums", "rollout_log_probs", "source_names", "prompt"),
    "teacher_log_probs",
)
"""Fields that reach an actor, for its samples."""


@dataclass(frozen=True)
class Slime:
    """Functions and classes of slime that call the hooks or that the hooks call."""

    sample: Callable[..., Any]
    convert: Callable[[Any, Sequence[Any]], dict[str, Any]]
    """Training data of samples, by the function of ``--custom-convert-samples-to-train-data-path``."""
    shipped: Callable[[Any, dict[str, Any], dict[str, int], int], dict[str, Any]]
    """Training data that the actors of one data-parallel rank receive."""
    sliced: Callable[[Any, int, int], Any]
    """A context-parallel rank's part of a response's values."""
    advantages: Callable[[Any, dict[str, Any]], None]
    logged: Callable[[Any, dict[str, Any]], None]
    """Log a rollout's data, which fails for fields of other types than slime's."""
    log_probs: Callable[[Any, Tensor, dict[str, Any]], list[Tensor]]
    iterator: Callable[[dict[str, Any], list[list[int]]], Any]
    get_batch: Callable[..., dict[str, Any]]
    loss_function: Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]
    reduced: Callable[..., dict[str, float]]


def slime(kind: str) -> Slime:
    """slime of a kind, "model" or "slime", whose modules are then those that are imported by name."""
    from tests.host import slime_model, slime_real

    found, modules = slime_real.real() if kind == "slime" else slime_model.model()
    for name in module_names():
        del sys.modules[name]
    sys.modules.update(modules)
    return found


def module_names() -> list[str]:
    """slime's modules that are imported."""
    return [name for name in sys.modules if name == "slime" or name.startswith("slime.")]


def load_function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


# --- the checkout


def reason_to_skip() -> str | None:
    folder = os.environ.get(CHECKOUT)
    if folder is None:
        return f"needs a checkout of slime, named by {CHECKOUT}"
    return None if os.path.isdir(os.path.join(folder, "slime")) else f"{CHECKOUT}: no package slime in {folder}"


def calls(path: str, name: str) -> list[str]:
    """Calls of a function in a module of the checkout that cannot be imported, as source text."""
    tree = ast.parse((Path(os.environ[CHECKOUT]) / path).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(node) for node in found if ast.unparse(node.func).rpartition(".")[2] == name]


needs_slime = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))
with_contract = pytest.mark.parametrize("kind", ["model", pytest.param("slime", marks=needs_slime)])


# --- arguments and data


def arguments(folder: Any, **changes: Any) -> Namespace:
    """slime's arguments, for rewards that are the advantages."""
    hooks = "sdpg_megatron.plugins.slime"
    defaults: dict[str, Any] = {
        "hf_checkpoint": str(folder),
        "custom_convert_samples_to_train_data_path": f"{hooks}.samples.convert",
        "rollout_data_postprocess_path": f"{hooks}.hooks.postprocess",
        "custom_megatron_before_train_step_hook_path": f"{hooks}.hooks.before_train_step",
        "custom_megatron_before_log_prob_hook_path": f"{hooks}.hooks.before_log_prob",
        "custom_loss_function_path": f"{hooks}.hooks.loss",
        "loss_type": "custom_loss",
        "advantage_estimator": "grpo",
        "rewards_normalization": False,
        "grpo_std_normalization": False,
        "normalize_advantages": False,
        "custom_advantage_function_path": None,
        "compute_advantages_and_returns": True,
        "reward_key": None,
        "num_rollout": 4,
        "rollout_batch_size": 7,
        "n_samples_per_prompt": 1,
        "global_batch_size": 7,
        "micro_batch_size": 2,
        "use_dynamic_batch_size": False,
        "balance_data": False,
        "balance_by_flops": False,
        "data_pad_size_multiplier": 4,
        "allgather_cp": False,
        "calculate_per_token_loss": True,
        "recompute_loss_function": False,
        "use_rollout_logprobs": False,
        "use_kl_loss": True,
        "kl_coef": 0.0,
        "kl_loss_coef": 0.0,
        "entropy_coef": 0.0,
        "use_opd": False,
        "rollout_temperature": 1.0,
        "rollout_top_p": 1.0,
        "log_probs_chunk_size": -1,
        "enable_mtp_training": False,
        "mtp_num_layers": None,
        "overlap_param_gather": False,
        "vocab_size": 300,
        "padded_vocab_size": 384,
        "apply_chat_template_kwargs": None,
        **dict.fromkeys(("ci_test", "log_multi_turn", "log_passrate", "log_correct_samples"), False),
        "sdpg": {},
    }
    return Namespace(**{**defaults, **changes})


def actor_data(found: Slime, args: Any, data: dict[str, Any], sizes: dict[str, int], data_rank: int) -> dict[str, Any]:
    """Training data of an actor, as slime's `_get_rollout_data` leaves it."""
    received = found.shipped(args, data, sizes, data_rank)
    received["tokens"] = [torch.as_tensor(tokens, dtype=torch.long) for tokens in received["tokens"]]
    received["loss_masks"] = [torch.as_tensor(mask, dtype=torch.int) for mask in received["loss_masks"]]
    received["rollout_mask_sums"] = torch.as_tensor(received["rollout_mask_sums"], dtype=torch.float32)
    received["rollout_log_probs"] = [
        torch.as_tensor(found.sliced(values, total, length), dtype=torch.float32)
        for values, total, length in zip(
            received["rollout_log_probs"], received["total_lengths"], received["response_lengths"], strict=True
        )
    ]
    return received


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    return float((found - expected).norm() / expected.norm().clamp(min=math.ulp(1.0)))
