"""Checks of stored tensors: shapes against config.json, and finite values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights.map import Shape, hf_shapes

_KEYS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim (or hidden_size / num_attention_heads)",
}
"""Dimensions of an architecture, and what config.json calls them."""


class StoredTensors(Protocol):
    """Tensors in a folder."""

    folder: Path

    def shape(self, name: str) -> Shape: ...

    def file_of(self, name: str) -> Path: ...


def check_stored_shapes(arch: Architecture, source: StoredTensors, names: Iterable[str]) -> None:
    """Hold the shapes of tensors against those that an architecture gives them.

    Raises:
        WeightError: naming the first tensor that has another shape, its file, and the keys of config.json that its
            shape follows from.
    """
    expected = hf_shapes(arch)
    wanted = set(names)
    for name in expected:
        if name in wanted and (found := source.shape(name)) != expected[name]:
            config = source.folder / "config.json"
            raise WeightError(
                f"{source.file_of(name)}: tensor {name!r} has shape {list(found)}, expected {list(expected[name])} "
                f"from {_keys(arch, name, found)} in {config}. Fix: the weights belong to another config.json"
            )


def check_finite(tensor: Tensor, name: str, where: object, fix: str = "download the file again") -> None:
    """Check that a tensor, or a part of one, has no infinity and no NaN.

    Args:
        name: of the tensor, for the error.
        where: file or folder that it is read from or written to.

    Raises:
        WeightError: naming the tensor and how many of its values are not finite.
    """
    finite = tensor.isfinite()
    if not finite.all():
        count = f"{tensor.numel() - int(finite.sum())} of {tensor.numel()} values"
        raise WeightError(
            f"{where}: tensor {name!r}: found {count} that are not finite in {_name(tensor)}, expected finite numbers. "
            f"Fix: {fix}"
        )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _keys(arch: Architecture, name: str, found: Shape) -> str:
    """The keys of config.json, with their values, that the dimensions which differ follow from."""
    expected = hf_shapes(arch)[name]
    if len(found) != len(expected):
        return "the model's family"
    differ = [dim for dim, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    keys = []
    for key, value, altered in _alterations(arch):
        other = hf_shapes(altered)[name]
        if any(other[dim] != expected[dim] for dim in differ):
            keys.append(f"{key} = {value}")
    return " and ".join(keys) or "the sizes"


def _alterations(arch: Architecture) -> Iterator[tuple[str, int, Architecture]]:
    """Each dimension's key and value, with an architecture that has it twice as large."""
    for field, usual in _KEYS.items():
        key = "moe_intermediate_size" if (field, arch.family) == ("ffn_size", "qwen3_moe") else usual
        value = getattr(arch, field)
        yield key, value, replace(arch, **{field: 2 * value})
