"""Verifier `reasoning_gym`: the scorer of the prompt's task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from reasoning_gym import create_dataset
from reasoning_gym.utils import extract_answer

from sdpg_megatron.records import Prompt


def reasoning_gym(prompt: Prompt, response: str) -> float:
    """Score of `response` by the prompt's task, from 0.0 to 1.0.

    The task scores the last ``<answer>...</answer>`` of the response, or else the whole response.

    Raises:
        ValueError: the prompt does not come from a reasoning-gym task.
    """
    problem = prompt.metadata.get("reasoning_gym")
    if not isinstance(problem, Mapping):
        raise ValueError(f"{prompt.uid} is not a prompt of a reasoning-gym task")
    task = _task(problem["task"], json.dumps(problem["parameters"], sort_keys=True))
    tagged = extract_answer(response)
    return float(task.score_answer(response.strip() if tagged is None else tagged, dict(problem["entry"])))


@lru_cache
def _task(name: str, parameters: str) -> Any:
    return create_dataset(name, **json.loads(parameters))
