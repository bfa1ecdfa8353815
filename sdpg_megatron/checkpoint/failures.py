"""Exceptions of Megatron and torch about a checkpoint's tensors."""

from __future__ import annotations

import pickle

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

UNREADABLE = (
    dist_checkpointing.core.CheckpointingException, CheckpointException, pickle.UnpicklingError,
    OSError, EOFError, RuntimeError, KeyError, ValueError,
)  # fmt: skip
"""Raised for tensors that are missing, truncated or not tensors."""


def describe(error: BaseException) -> str:
    """Message of an error on one line; of the first failed rank for a `CheckpointException`."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__
