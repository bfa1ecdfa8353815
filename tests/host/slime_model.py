"""A small model of slime 624b824a: its records, shapes and scalings, and none of its other features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tests.host.slime_contract import SHIPPED, Slime, load_function


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
