"""Responses that were generated ahead of their step, saved in a checkpoint: their weights no longer exist."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdpg_megatron.data.source import PromptSource
from sdpg_megatron.errors import CheckpointError, reason_of
from sdpg_megatron.records import Completion, Group, ScoredGroup

PREFETCHED = "drawn.safetensors"
_WORDS = "words"
"""Entry with finish reasons and texts, as JSON in UTF-8."""
_ERRORS = "errors"
"""Entry with the verifier's errors, if any, as JSON in UTF-8."""


@dataclass(frozen=True, slots=True)
class PrefetchedRollouts:
    """First round of a step's rollouts. Without groups, the responses are to be generated again."""

    indices: tuple[int, ...]
    """Indices of the prompts in the run's data."""
    groups: tuple[ScoredGroup, ...]
    """One group per prompt, without advantages."""


def write_prefetched(path: Path, prefetched: PrefetchedRollouts) -> None:
    """Write flat arrays, in the order of the responses. Raises `OSError`."""
    completions = [completion for scored in prefetched.groups for completion in scored.group.completions]
    arrays = {
        "prompts": np.array(prefetched.indices, np.int64),
        "sizes": np.array([len(scored.group.completions) for scored in prefetched.groups], np.int64),
        "failures": np.array([scored.failures for scored in prefetched.groups], np.int64),
        "rewards": np.array([reward for scored in prefetched.groups for reward in scored.rewards], np.float64),
        "versions": np.array([completion.weight_version for completion in completions], np.int64),
        "lengths": np.array([len(completion.tokens) for completion in completions], np.int64),
        "tokens": np.concatenate([np.empty(0, np.int32), *(c.tokens for c in completions)]),
        "logprobs": np.concatenate([np.empty(0, np.float32), *(c.logprobs for c in completions)]),
    }
    experts = [completion.experts for completion in completions if completion.experts is not None]
    if experts:
        arrays["experts"] = np.concatenate(experts)
        arrays["routed"] = np.array([0 if c.experts is None else len(c.experts) for c in completions], np.int64)
    words = json.dumps([(completion.finish_reason, completion.text) for completion in completions])
    arrays[_WORDS] = np.frombuffer(words.encode(), np.uint8)  # safetensors metadata is limited to 100 MB
    if any(scored.errors for scored in prefetched.groups):
        arrays[_ERRORS] = np.frombuffer(json.dumps([scored.errors for scored in prefetched.groups]).encode(), np.uint8)
    try:
        save_file(arrays, path)
    except SafetensorError as error:  # raised for write errors too
        raise OSError(f"{path}: {error}") from error


def read_prefetched(path: Path, prompts: PromptSource) -> PrefetchedRollouts:
    """Read a file of `write_prefetched`. Raises `CheckpointError`."""
    try:
        with safe_open(path, framework="np") as file:
            # safetensors has type hints for torch only
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = json.loads(arrays[_WORDS].tobytes())
        completions = list(_completions(arrays, words))
        rewards = arrays["rewards"].tolist()
        sizes, indices, failed = (arrays[name].tolist() for name in ("sizes", "prompts", "failures"))
        if not sizes:
            return PrefetchedRollouts(tuple(indices), ())
        saved_errors = json.loads(arrays[_ERRORS].tobytes()) if _ERRORS in arrays else [()] * len(sizes)
        groups = []
        for (start, end), index, failures, errors in zip(_spans(sizes), indices, failed, saved_errors, strict=True):
            group = Group(prompts[index], tuple(completions[start:end]))
            given = tuple(rewards[start:end])
            groups.append(ScoredGroup(group, given, (), failures, errors=tuple(errors)))
        return PrefetchedRollouts(tuple(indices), tuple(groups))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        expected = "responses that a run has generated ahead"
        raise CheckpointError(f"{path}: found {reason_of(error)}, expected {expected}") from error


def _completions(arrays: dict[str, Any], words: Sequence[tuple[Any, str]]) -> Iterator[Completion]:
    tokens, logprobs = arrays["tokens"], arrays["logprobs"]
    if tokens.dtype.kind != "i" or logprobs.dtype.kind != "f":
        raise ValueError(f"tokens of type {tokens.dtype} and log-probs of type {logprobs.dtype}")
    # Earlier versions wrote int64 and float64.
    tokens, logprobs = tokens.astype(np.int32, copy=False), logprobs.astype(np.float32, copy=False)
    routed = _spans(arrays["routed"].tolist()) if "routed" in arrays else [(0, 0)] * len(words)
    for (reason, text), (start, end), version, (first, last) in zip(
        words, _spans(arrays["lengths"].tolist()), arrays["versions"].tolist(), routed, strict=True
    ):
        experts = arrays["experts"][first:last] if last > first else None
        yield Completion(tokens[start:end], logprobs[start:end], reason, version, text, experts)


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each of consecutive parts."""
    return list(pairwise(accumulate(lengths, initial=0)))
