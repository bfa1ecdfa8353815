"""Completions from plain sequences of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdpg_megatron.records import Completion, FinishReason


def make_completion(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: FinishReason,
    weight_version: int,
    text: str,
    experts: Any = None,
) -> Completion:
    arrays = np.array(tokens, np.int32), np.array(logprobs, np.float32)
    return Completion(*arrays, finish_reason, weight_version, text, experts)
