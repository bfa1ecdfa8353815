"""Errors travel between ranks."""

from __future__ import annotations

import pickle

import pytest

from sdpg_megatron import errors
from sdpg_megatron.errors import (
    ConfigError,
    ConversionError,
    DataError,
    EvaluationError,
    FilterError,
    LaunchError,
    MismatchError,
    RolloutError,
    SdpgError,
    ServerError,
    SkippedStepsError,
    VerifierError,
    WriteError,
)
from sdpg_megatron.records import Group, Prompt
from sdpg_megatron.rollout.base import WeightsWanted

EXAMPLES: list[SdpgError] = [
    ConfigError("model.path", "here", "a folder", "make one"),
    ConversionError("a: vocab_size", "3", "4, which config.json says", "use another"),
    DataError("a.jsonl:3", "nothing", "a row", "write one"),
    EvaluationError("eval/summary.json", "nothing", "a summary", "evaluate first"),
    FilterError("filters:easy", "train.jsonl:4", "None"),
    MismatchError(3, 0.5, 0.05),
    LaunchError("MASTER_PORT", "29500, in use", "a free port", "choose another"),
    SkippedStepsError(7, 3),
    ServerError("http://127.0.0.1:1", "/health", "no answer", retryable=True),
    VerifierError("step 1", 4, 4, "on a:1: ValueError: no", 0.5),
    RolloutError("no server is left"),
    WriteError("run/metrics.jsonl", "No space left on device", 0),
    WeightsWanted("none", {2: Group(Prompt("a:1", (1,), (2,), "3"), ())}),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_a_journey(error: SdpgError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)


def test_every_error_with_a_constructor_of_its_own_is_among_the_examples() -> None:
    own = {kind for kind in vars(errors).values() if isinstance(kind, type) and "__init__" in vars(kind)}
    assert own <= {type(error) for error in EXAMPLES}
