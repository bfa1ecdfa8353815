"""What Megatron and torch raise about a checkpoint's tensors."""

from __future__ import annotations

import pickle

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

UNREADABLE = (
    dist_checkpointing.core.CheckpointingException, CheckpointException, pickle.UnpicklingError,
    OSError, EOFError, RuntimeError, KeyError, ValueError,
)  # fmt: skip
"""Where they are not there, not whole, or no tensors."""


def describe(error: BaseException) -> str:
    """In one line, with what a rank's reader or writer said."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__
