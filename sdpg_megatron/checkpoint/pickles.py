"""The one pickle of a checkpoint that torch reads whole: looked through before torch does."""

from __future__ import annotations

import dataclasses
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from sdpg_megatron.errors import CheckpointError

TENSOR_LIST = ".metadata"
"""What lies where, as `torch.distributed.checkpoint` keeps it."""
DESCRIPTIONS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
"""Modules whose data classes and enumerations describe tensors, and do nothing when they are made."""
OTHERS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


def check_tensor_list(checkpoint: Path) -> None:
    """Raises `CheckpointError` where the list of tensors is no pickle, or one of anything but descriptions."""
    path = checkpoint / TENSOR_LIST
    try:
        with path.open("rb") as file:
            _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path}: found {type(error).__name__}: {error}, expected torch's list") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle asks for, if it may."""
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.layout):
            return found
        if (module, name) in OTHERS or (module.startswith(DESCRIPTIONS) and "." not in name):
            found = super().find_class(module, name)
            if (module, name) in OTHERS or _describes(found):
                return found
        raise CheckpointError(
            f"found {module}.{name}, expected torch's and Megatron's descriptions of tensors alone. "
            "Fix: do not read this checkpoint: it would run code"
        )


def _describes(found: Any) -> bool:
    return isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
