"""slime around its function paths: a small model of its records and loss, and the real modules of a checkout.

The model holds for slime 624b824a. It has slime's shapes and scalings, and none of its other features. `real()` imports
slime's own modules from the checkout that the environment variable SDPG_SLIME names, with stubs for ray, SGLang and the
accelerator, which it cannot have on a CPU.
"""

from __future__ import annotations

import ast
import functools
import importlib
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

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
    found, modules = real() if kind == "slime" else model()
    for name in _names():
        del sys.modules[name]
    sys.modules.update(modules)
    return found


def _names() -> list[str]:
    return [name for name in sys.modules if name == "slime" or name.startswith("slime.")]


# --- a model of slime


@dataclass
class ModelSample:
    index: int
    tokens: list[int]
    response_length: int
    reward: float
    rollout_id: int
    group_index: int = 0
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


class RolloutManager:
    """In the place of slime's class, which ray wraps."""

    args: Any
    custom_convert_samples_to_train_data_func: Any

    def _convert_samples_to_train_data(self, samples: list[ModelSample]) -> dict[str, Any]:
        if self.custom_convert_samples_to_train_data_func is not None:
            found: dict[str, Any] = self.custom_convert_samples_to_train_data_func(self.args, samples)
            return found
        masks = [s.loss_mask or [1] * s.response_length for s in samples]
        masks = [[0] * len(mask) if s.remove_sample else mask for s, mask in zip(samples, masks, strict=True)]
        total: dict[int, int] = {}
        for sample, mask in zip(samples, masks, strict=True):
            total[sample.rollout_id] = total.get(sample.rollout_id, 0) + sum(mask)
        return {
            "tokens": [s.tokens for s in samples],
            "response_lengths": [s.response_length for s in samples],
            "rewards": [s.reward for s in samples],
            "raw_reward": [s.reward for s in samples],
            "loss_masks": masks,
            "rollout_ids": [s.rollout_id for s in samples],
            "rollout_mask_sums": [total[s.rollout_id] for s in samples],
            "rollout_log_probs": [s.rollout_log_probs for s in samples],
        }


class ModelIterator:
    def __init__(self, data: dict[str, Any], micro_batches: list[list[int]]) -> None:
        self.data, self.micro_batches, self.offset = data, micro_batches, 0

    def get_next(self, keys: Sequence[str]) -> dict[str, Any]:
        chosen = self.micro_batches[self.offset]
        self.offset += 1
        return {key: None if key not in self.data else [self.data[key][i] for i in chosen] for key in keys}


def model() -> tuple[Slime, dict[str, ModuleType]]:
    modules = {name: ModuleType(name) for name in ("slime", "slime.ray", "slime.ray.rollout")}
    package: Any = modules["slime.ray.rollout"]
    package.RolloutManager = SimpleNamespace(__ray_metadata__=SimpleNamespace(modified_class=RolloutManager))
    package.load_function = load_function
    found = Slime(
        sample=ModelSample,
        convert=lambda args, samples: load_function(args.custom_convert_samples_to_train_data_path)(args, samples),
        shipped=_shipped,
        sliced=_sliced,
        advantages=_advantages,
        logged=_logged,
        log_probs=_log_probs,
        iterator=ModelIterator,
        get_batch=_get_batch,
        loss_function=_loss_function,
        reduced=_reduced,
    )
    return found, modules


def load_function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _context() -> tuple[int, int]:
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()


def _half_chunks(values: Tensor) -> Tensor:
    """This rank's two chunks of a sequence, which is padded to 2 R of them."""
    size, rank = _context()
    if size == 1:
        return values
    chunks = functional.pad(values, (0, -len(values) % (2 * size))).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


def _sliced(values: Any, total: int, length: int) -> Any:
    """Values of the response tokens that this rank predicts, each at the position before it."""
    if _context()[0] == 1:
        return values
    at = torch.full((total,), -1)
    at[total - length - 1 : total - 1] = torch.arange(length)
    chosen = [i for i in (_half_chunks(at + 1) - 1).tolist() if i >= 0]
    return [values[i] for i in chosen] if isinstance(values, list) else values[chosen]


def _shipped(args: Any, data: dict[str, Any], parallel: dict[str, int], data_rank: int) -> dict[str, Any]:
    """Micro-batches of two samples in their order, dealt to the data-parallel ranks in turn."""
    totals = [len(tokens) for tokens in data["tokens"]]
    rollouts = sorted(set(data["rollout_ids"]))
    steps = len(rollouts) // args.global_batch_size
    partition: list[int] = []
    micro_batches: list[list[int]] = []
    for step in range(steps):
        chosen = rollouts[step * args.global_batch_size : (step + 1) * args.global_batch_size]
        members = [i for i, rollout in enumerate(data["rollout_ids"]) if rollout in chosen]
        for first in range(2 * data_rank, len(members), 2 * parallel["dp_size"]):
            part = members[first : first + 2]
            micro_batches.append(list(range(len(partition), len(partition) + len(part))))
            partition += part
    found: dict[str, Any] = {key: [data[key][i] for i in partition] for key in SHIPPED if key in data}
    found |= {"partition": partition, "total_lengths": [totals[i] for i in partition]}
    found |= {"global_batch_sizes": [args.global_batch_size] * steps, "micro_batch_indices": micro_batches}
    return found | {"num_microbatches": [len(micro_batches) // steps] * steps}


def _advantages(args: Any, data: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    if parallel_state.is_pipeline_last_stage():
        data["advantages"] = [
            torch.full_like(values, reward)
            for values, reward in zip(data["rollout_log_probs"], data["rewards"], strict=True)
        ]


UNLOGGED = (
    *("tokens", "multimodal_train_inputs", "loss_masks", "sample_indices", "rollout_ids", "rollout_mask_sums"),
    *("global_batch_sizes", "num_microbatches", "micro_batch_indices", "source_names", "local_raw_reward"),
)


def _logged(args: Any, data: dict[str, Any]) -> None:
    """slime sums or averages every other field before it trains; other types than these end its run."""
    for key, value in data.items():
        if key in UNLOGGED:
            continue
        if isinstance(value, list | tuple):
            assert isinstance(torch.cat(value) if isinstance(value[0], Tensor) else sum(value), Tensor | float | int), (
                key
            )
        else:
            assert isinstance(value, Tensor), f"{key}: {type(value)}"


def _log_probs(args: Any, logits: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """Without context parallelism, over all columns; the ranks' columns are gathered."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    logprobs = torch.cat(parts, dim=-1)[0].log_softmax(-1)
    found, first = [], 0
    for tokens, total, length in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        rows = logprobs[first + total - length - 1 : first + total - 1]
        found.append(rows.gather(1, tokens[-length:, None])[:, 0])
        first += total
    return found


def _get_batch(iterator: Any, keys: Sequence[str], pad_multiplier: int, allgather_cp: bool) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    batch: dict[str, Any] = iterator.get_next(keys)
    size, _ = _context()
    parts = [_half_chunks(tokens) for tokens in batch["tokens"]]
    unit = parallel_state.get_tensor_model_parallel_world_size() * pad_multiplier
    lengths = [len(part) for part in parts]
    if filling := -sum(lengths) % unit:
        lengths.append(filling)
    ends = torch.tensor([0, *lengths]).cumsum(0).int() * size
    masks = [
        _half_chunks(functional.pad(mask, (total - length - 1, 1)))
        for mask, total, length in zip(
            batch["loss_masks"], batch["total_lengths"], batch["response_lengths"], strict=True
        )
    ]
    longest = max(lengths) * size
    batch["unconcat_tokens"] = batch["tokens"]
    batch["tokens"] = functional.pad(torch.cat(parts), (0, filling))[None]
    batch["full_loss_masks"] = functional.pad(torch.cat(masks), (0, filling))[None]
    batch["packed_seq_params"] = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    return batch


def _reducer(batch: dict[str, Any], per_token: bool) -> Callable[[Tensor], Tensor]:
    lengths = zip(batch["total_lengths"], batch["response_lengths"], strict=True)
    masks = [_sliced(mask, *length) for mask, length in zip(batch["loss_masks"], lengths, strict=True)]
    sums = [1.0] * len(masks) if per_token else [max(1.0, float(total)) for total in batch["rollout_mask_sums"]]

    def reduce(values: Tensor) -> Tensor:
        parts = values.split([len(mask) for mask in masks])
        return torch.stack([(x * m).sum() / total for x, m, total in zip(parts, masks, sums, strict=True)]).sum()

    return reduce


def _loss_function(
    args: Any, batch: dict[str, Any], num_microbatches: int, batch_size: int, output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    from megatron.core import parallel_state

    tokens = torch.stack([mask.sum().clamp(min=1) for mask in batch["loss_masks"]]).sum()
    function = load_function(args.custom_loss_function_path)
    loss, log = function(args, batch, output, _reducer(batch, args.calculate_per_token_loss))
    if args.calculate_per_token_loss:
        loss = loss * parallel_state.get_context_parallel_world_size()
    else:
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        loss = loss * num_microbatches * ranks / batch_size
    counted = tokens if args.calculate_per_token_loss else torch.tensor(1)
    values = torch.tensor([float(tokens) if args.calculate_per_token_loss else 0.0, *map(float, log.values())])
    return loss, counted, {"keys": list(log), "values": values}


def _reduced(losses: list[dict[str, Any]], *, per_token: bool, batch_size: int) -> dict[str, float]:
    from megatron.core import parallel_state

    values = torch.stack([loss["values"] for loss in losses]).sum(0)
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    scale = parallel_state.get_context_parallel_world_size() / float(values[0]) if per_token else 1 / batch_size
    return {key: float(value) * scale for key, value in zip(losses[0]["keys"], values[1:], strict=True)}


# --- the real one


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


def _stubs() -> None:
    """Packages that slime imports and that no CPU needs."""

    def remote(*given: Any, **options: Any) -> Any:
        if not given:
            return remote
        return SimpleNamespace(__ray_metadata__=SimpleNamespace(modified_class=given[0]))

    ray = mock.MagicMock(name="ray", remote=remote, put=lambda value, **options: value, get=lambda value: value)
    sys.modules["ray"] = ray
    for name in (
        "ray.util",
        "ray.util.scheduling_strategies",
        "sglang",
        "sglang.srt",
        "sglang.srt.constants",
        "sglang_router",
        "pybase64",
        "slime.backends.sglang_utils.external",
        "slime.backends.sglang_utils.sglang_config",
        "slime.backends.sglang_utils.sglang_engine",
    ):
        sys.modules[name] = mock.MagicMock(name=name)


@functools.cache
def real() -> tuple[Slime, dict[str, ModuleType]]:
    """slime's own modules, but for `model.py` and `actor.py`, which need Megatron-LM's `megatron.training`."""
    for name in _names():
        del sys.modules[name]
    sys.path.append(os.environ[CHECKOUT])  # it has a package `examples`, too
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    _stubs()
    base: Any = importlib.import_module("slime.utils.accelerator.base")
    accelerator: Any = importlib.import_module("slime.utils.accelerator")

    class Cpu(base.Accelerator):  # type: ignore[misc]
        name, device_type, communication_backend_name = "cpu", "cpu", "gloo"

    Cpu.__abstractmethods__ = frozenset()
    Cpu.is_available = lambda self: True
    Cpu.device = lambda self, index=None: torch.device("cpu")
    Cpu.current_device = lambda self: "cpu"
    accelerator.set_accelerator(Cpu())
    types: Any = importlib.import_module("slime.utils.types")
    rollout: Any = importlib.import_module("slime.ray.rollout")
    data: Any = importlib.import_module("slime.utils.data")
    batches: Any = importlib.import_module("slime.backends.megatron_utils.data")
    parallel: Any = importlib.import_module("slime.backends.megatron_utils.cp_utils")
    losses: Any = importlib.import_module("slime.backends.megatron_utils.loss")
    metrics: Any = importlib.import_module("slime.observability.train_metric_utils")

    def manager(args: Any) -> Any:
        found = object.__new__(rollout.RolloutManager.__ray_metadata__.modified_class)
        found.args, found.custom_reward_post_process_func = args, None
        found.custom_convert_samples_to_train_data_func = rollout.load_function(
            args.custom_convert_samples_to_train_data_path
        )
        return found

    def shipped(args: Any, train_data: dict[str, Any], sizes: dict[str, int], data_rank: int) -> dict[str, Any]:
        owner = manager(args)
        owner.train_parallel_config = sizes
        boxes = owner._split_train_data_by_dp(train_data)
        found: dict[str, Any] = data.process_rollout_data(args, boxes, data_rank, sizes["dp_size"])
        return found

    def logged(args: Any, rollout_data: dict[str, Any]) -> None:
        with mock.patch.object(metrics, "gather_log_data", return_value=None):  # to a tracker
            metrics.log_rollout_data(0, args, rollout_data)

    def log_probs(args: Any, logits: Tensor, batch: dict[str, Any]) -> list[Tensor]:
        lengths = {key: batch[key] for key in ("unconcat_tokens", "total_lengths", "response_lengths")}
        found: list[Tensor] = losses.get_log_probs_and_entropy(logits, args=args, **lengths)[1]["log_probs"]
        return found

    def reduced(given: list[dict[str, Any]], *, per_token: bool, batch_size: int) -> dict[str, float]:
        from megatron.core import parallel_state

        found: dict[str, float] = metrics.reduce_train_step_metrics(
            given,
            calculate_per_token_loss=per_token,
            step_global_batch_size=batch_size,
            cp_size=parallel_state.get_context_parallel_world_size(),
            dp_with_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        return found

    found = Slime(
        sample=types.Sample,
        convert=lambda args, samples: manager(args)._convert_samples_to_train_data(samples),
        shipped=shipped,
        sliced=parallel.slice_log_prob_with_cp,
        advantages=losses.compute_advantages_and_returns,
        logged=logged,
        log_probs=log_probs,
        iterator=batches.DataIterator,
        get_batch=batches.get_batch,
        loss_function=losses.loss_function,
        reduced=reduced,
    )
    return found, {name: sys.modules[name] for name in _names()}


# --- what both share


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
