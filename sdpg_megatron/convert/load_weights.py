"""Load a Megatron checkpoint's weights into model chunks with megatron-core's loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import nn

from sdpg_megatron.checkpoint.failures import UNREADABLE, describe
from sdpg_megatron.checkpoint.pickles import only_weights, read_tensor_list
from sdpg_megatron.convert.torch_dist import check_backend, trusted_globals
from sdpg_megatron.errors import CheckpointError


def load_weights_only(chunks: Sequence[nn.Module], folder: Path) -> None:
    """Load weights into this rank's model chunks, under any layout. Collective.

    Raises:
        CheckpointError: the checkpoint is damaged, does not fit the model, or reading it would run code.
    """
    check_backend(folder)
    read_tensor_list(folder)  # checks the metadata, which megatron-core reads without restrictions
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    wanted: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}  # type: ignore[operator]
    try:
        with only_weights(), torch.serialization.safe_globals(trusted_globals()):
            found = dist_checkpointing.load(wanted, str(folder))
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: found tensors that do not fit the model ({describe(error)})") from error
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(found[name])
