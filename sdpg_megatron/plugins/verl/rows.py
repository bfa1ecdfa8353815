"""Read verl's batches: a TensorDict's sequences as samples, and its per-token fields.

Shapes: B sequences of a batch, N columns of verl's response mask, A response tokens, T of them that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdpg_megatron.batching.samples import Sample
from sdpg_megatron.errors import ConfigError, DataError
from sdpg_megatron.objectives import Objective

if TYPE_CHECKING:
    from sdpg_megatron.batching.samples import Gates
    from sdpg_megatron.records import TokenIds

TEACHER_KEY = "teacher_prompt_ids"
"""Field with the tokens of the teacher's prompt, a list of ints per sample, without the response."""
HOLDERS = ("extra_fields", "extra_info")
"""Fields of mappings that may hold `TEACHER_KEY`: what an agent loop returns, and what a data set gives."""
FIELDS = {
    "old_logprobs_T": "old_log_probs",
    "reference_logprobs_T": "ref_log_prob",
    "corrections_T": "rollout_is_weights",
    "advantages_T": "advantages",
}
"""verl's name of each per-token field of a `MicroBatch`."""


@dataclass(frozen=True, eq=False)
class HostRows:
    """Sequences of a micro-batch on this data-parallel rank."""

    samples: list[Sample]
    """Weights and advantages are in `tokens`."""
    tokens: dict[str, Tensor]
    """Fields of `MicroBatch`, float32 [T], over all context-parallel ranks."""
    mask_BN: Tensor
    """bool: verl's response mask, padded on the right. T of its values are true."""
    predicted_A: Tensor
    """bool: the same mask without padding, sequence by sequence."""

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Lengths of each sequence's prompt and response."""
        return [len(s.student_prompt) for s in self.samples], [len(s.response) for s in self.samples]


def read_rows(data: Any, objective: Objective, *, distills: bool, stop_ids: Sequence[int] = ()) -> HostRows:
    """Read a TensorDict of verl's actor update, nested or padded, on any device.

    Args:
        distills: the step needs the teacher.
        stop_ids: tokens without a distillation term.

    Raises:
        DataError: the step needs the teacher, a response is to be distilled, and the batch has no teacher prompts.
    """
    lengths = _response_lengths(data)
    masks = [row.bool().numpy() for row in _response_rows(data, "response_mask", lengths)]
    values = {
        ours: _response_rows(data, name, lengths)
        for ours, name in {**FIELDS, "rollout": "rollout_log_probs"}.items()
        if name in data
    }
    rollout = values.pop("rollout", values["old_logprobs_T"])
    teachers = teacher_prompts(data, len(lengths)) if distills else None
    samples = []
    for number, tokens in enumerate(_sequences(data)):
        start = len(tokens) - lengths[number]
        response, predicted = tokens[start:], masks[number]
        gates = np.zeros(len(response), bool)
        if distills and (teachers is None or len(teachers[number])):
            gates = predicted & _distilled(values["advantages_T"][number], objective) & ~np.isin(response, stop_ids)
        if teachers is None and gates.any():
            raise _no_prompts(data)
        samples.append(
            Sample(
                student_prompt=tokens[:start],
                teacher_prompt=tokens[:0] if teachers is None else teachers[number],
                response=response,
                logprobs=rollout[number].numpy(),
                advantage=0.0,
                gates=gates,
                weight=1.0,
                predicted=predicted,
            )
        )
    counted = [torch.from_numpy(mask) for mask in masks]
    return HostRows(
        samples,
        {
            name: torch.cat([row[mask] for row, mask in zip(rows, counted, strict=True)])
            for name, rows in values.items()
        },
        _padded(data["response_mask"]).bool().cpu(),
        torch.cat(counted),
    )


def count_tokens(data: Any) -> tuple[int, int]:
    """Number of response tokens that count, and of all tokens, of a batch."""
    mask = data["response_mask"]
    return int((mask.values() if mask.is_nested else mask).sum()), int(data["input_ids"].offsets().diff().sum())


def uniform_temperature(data: Any) -> float:
    """Sampling temperature of a batch.

    Raises:
        ConfigError: it differs between samples.
    """
    found = torch.as_tensor(data["temperature"], dtype=torch.float32).flatten()
    if not bool((found == found[0]).all()):
        expected = "one temperature for all samples"
        raise ConfigError("temperature", sorted(set(found.tolist())), expected, "sample at one temperature")
    return float(found[0])


def teacher_prompts(data: Any, count: int) -> list[TokenIds] | None:
    """Teacher prompt of each sample, empty for none. None if the batch has no such field; see `TEACHER_KEY`."""
    if TEACHER_KEY in data:
        field = data[TEACHER_KEY]
        if isinstance(field, Tensor) and not field.is_nested:
            expected = "a nested tensor, or a list of ints per sample"
            raise DataError(TEACHER_KEY, f"a padded tensor {tuple(field.shape)}", expected, "remove the padding")
        found = [*field.unbind()] if isinstance(field, Tensor) else list(field)
    else:
        holders = [list(data[name]) for name in HOLDERS if name in data]
        found = [_first(row[number] for row in holders) for number in range(count)]
        if all(prompt is None for prompt in found):
            return None
    return [_token_ids(prompt) for prompt in found]


def _first(mappings: Iterator[Any]) -> Any:
    """First value of `TEACHER_KEY` that is not None."""
    found = (mapping.get(TEACHER_KEY) for mapping in mappings if isinstance(mapping, dict))
    return next((value for value in found if value is not None), None)


def _token_ids(prompt: Any) -> TokenIds:
    if isinstance(prompt, Tensor):
        prompt = prompt.cpu().numpy()
    return np.asarray([] if prompt is None else prompt, np.int32)


def _distilled(advantages_N: Tensor, objective: Objective) -> Gates:
    """`Objective.distill_enabled` of each token's advantage."""
    values, where_N = np.unique(advantages_N.numpy(), return_inverse=True)
    enabled = np.array([objective.distill_enabled(float(value)) for value in values], bool)
    gates: Gates = enabled[where_N]
    return gates


def _no_prompts(data: Any) -> DataError:
    known = ", ".join(sorted(str(key) for key in data.keys()))  # noqa: SIM118  a TensorDict iterates over its rows
    return DataError(
        f"field {TEACHER_KEY} of verl's batch",
        f"none (there are {known})",
        f"the teacher's prompt of each sample, there or in {' or '.join(HOLDERS)}",
        "set data.custom_cls to sdpg_megatron.plugins.verl.dataset.PrivilegedDataset, or objective.beta to 0",
    )


# --- nested and padded fields


def _sequences(data: Any) -> list[TokenIds]:
    """Tokens of each sequence. verl gives them nested to every engine."""
    return [row.numpy().astype(np.int32) for row in data["input_ids"].cpu().unbind()]


def _response_lengths(data: Any) -> list[int]:
    responses = data["responses"]
    if responses.is_nested:
        lengths: list[int] = responses.offsets().diff().tolist()
        return lengths
    prompt_columns = data["prompts"].shape[1]
    padded: list[int] = data["attention_mask"][:, prompt_columns:].sum(1).tolist()
    return padded


def _response_rows(data: Any, name: str, lengths: Sequence[int]) -> list[Tensor]:
    """A field's values for each response, float32 on the host, without padding."""
    rows = data[name].cpu().unbind()
    return [row[:length].float() for row, length in zip(rows, lengths, strict=True)]


def _padded(field: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(field, 0) if field.is_nested else field
