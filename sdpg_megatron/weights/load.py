"""Hugging Face safetensors into Megatron shards: each rank reads only its own slices."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import WeightError, reason_of
from sdpg_megatron.hf_files import check_file
from sdpg_megatron.weights.map import (
    WHOLE_EXPERTS,
    ExpertShare,
    Parameter,
    Shape,
    check_folder,
    check_local,
    hf_shapes,
    weight_map,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported weight types by their names in safetensors."""
_KEYS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim (or hidden_size / num_attention_heads)",
}
"""Dimensions of an architecture and their keys in config.json."""


class SafetensorsFolder:
    """Slices of the tensors in a Hugging Face folder. Files are memory-mapped when first used."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            WeightError: the folder has neither a single file nor an index, or one that cannot be read.
            ConfigError: a file is a Git LFS pointer, empty, or a broken link; also from all methods that read.
        """
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of = self._find_files()

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    @property
    def where(self) -> Path:
        """The file that lists the tensors."""
        single = self.folder / SINGLE_FILE
        return single if set(self._file_of.values()) == {SINGLE_FILE} else self.folder / INDEX_FILE

    def file_of(self, name: str) -> Path:
        return self.folder / self._file_of[name]

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises `WeightError` for other types; quantized ones have scales, which the maps do not have."""
        found = self._slice(name).get_dtype()
        if found not in DTYPES:
            expected = f"one of {', '.join(DTYPES)}"
            raise WeightError(
                f"{self.file_of(name)}: tensor {name!r} has type {found}, expected {expected}. Fix: take the model's "
                "weights before quantization, or save them as bfloat16"
            )
        return DTYPES[found]

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1) of a tensor from `start`, on the CPU, as stored."""
        part: Tensor = self._slice(name)[(slice(None),) * dim + (slice(start, start + length),)]
        return part

    def close(self) -> None:
        """Unmap the files; they are opened again when needed."""
        self._handles.clear()

    def check(self) -> None:
        """Raise `WeightError` if a file is missing or damaged, or lacks a tensor of the index."""
        for name in self.names:
            self._slice(name)

    def _find_files(self) -> dict[str, str]:
        if (self.folder / SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        try:
            index = json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))
            return _file_names(index["weight_map"])
        except FileNotFoundError as error:
            raise WeightError(
                f"{self.folder}: found neither {SINGLE_FILE} nor {INDEX_FILE}. Fix: give a Hugging Face folder with "
                "safetensors weights"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightError(f"{self.folder / INDEX_FILE}: not a safetensors index ({reason_of(error)})") from error

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch cannot map the file
                if os.path.lexists(self.folder / file):
                    check_file(self.folder / file)
                raise WeightError(f"{self.folder / file}: {reason_of(error)}. Fix: download the file again") from error
        return self._handles[file]

    def _slice(self, name: str) -> Any:
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise WeightError(f"{self.folder / file}: the index puts {name!r} here, but {error}") from error


def _file_names(weight_map: Any) -> dict[str, str]:
    """Check an index's table; every file must be in the index's own folder."""
    if not isinstance(weight_map, dict):
        raise TypeError(f"weight_map is a {type(weight_map).__name__}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ValueError(f"weight_map: {name}: found {file!r}, expected the name of a file of the folder")
    return weight_map


# --- checks


def open_weights(folder: Path, arch: Architecture) -> SafetensorsFolder:
    """Open a Hugging Face folder's weights, and check names, files, shapes and types. Only headers are read.

    Raises:
        WeightError: a file is missing or damaged; or a tensor is missing, unknown, or has a shape other than
            config.json gives it or an unsupported type.
    """
    source = SafetensorsFolder(folder)
    check_folder(arch, source.names, str(source.where))
    source.check()
    for name, expected in hf_shapes(arch).items():
        if (found := source.shape(name)) != expected:
            raise WeightError(
                f"{source.file_of(name)}: tensor {name!r} has shape {list(found)}, expected {list(expected)} "
                f"from {_keys(arch, name, found)} in {folder / 'config.json'}. Fix: the weights belong to another "
                "config.json"
            )
    for name in hf_shapes(arch):
        source.dtype(name)
    return source


def _keys(arch: Architecture, name: str, found: Shape) -> str:
    """Keys of config.json, with values, that determine the differing dimensions: a change of each changes one."""
    expected = hf_shapes(arch)[name]
    if len(found) != len(expected):
        return "the model's family"
    keys = []
    for field, usual in _KEYS.items():
        value = getattr(arch, field)
        altered = hf_shapes(replace(arch, **{field: 2 * value}))[name]
        if any(one != right != other for one, right, other in zip(found, expected, altered, strict=True)):
            key = "moe_intermediate_size" if (field, arch.family) == ("ffn_size", "qwen3_moe") else usual
            keys.append(f"{key} = {value}")
    return " and ".join(keys) or "the sizes"


def check_values(folder: Path, arch: Architecture) -> None:
    """Check that every value of a folder's weights is finite, reading one tensor at a time.

    Raises:
        WeightError: as `open_weights`; or naming the first tensor with a value that is not finite, and its file.
    """
    source = open_weights(folder, arch)
    for name, shape in hf_shapes(arch).items():
        check_finite(source.read(name, 0, 0, shape[0]), name, source.file_of(name))


def check_finite(tensor: Tensor, name: str, where: object, fix: str = "download the file again") -> None:
    """Check that a tensor, or a part of one, has only finite values.

    Args:
        name: name of the tensor, for the error.
        where: file or folder that it is read from or written to.

    Raises:
        WeightError: naming the tensor and the number of its values that are not finite.
    """
    finite = tensor.isfinite()
    if not finite.all():
        count = f"{tensor.numel() - int(finite.sum())} of {tensor.numel()} values"
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise WeightError(
            f"{where}: tensor {name!r}: found {count} that are not finite in {dtype}, expected finite numbers. "
            f"Fix: {fix}"
        )


# --- loading


def load_shards(
    local_params: Mapping[str, Tensor],
    folder: Path,
    arch: Architecture,
    *,
    tp_rank: int,
    tp_size: int,
    experts: ExpertShare = WHOLE_EXPERTS,
) -> None:
    """Fill a rank's parameters from a Hugging Face folder.

    Args:
        local_params: the rank's parameters under their Megatron names with global layer and expert numbers, on any
            device; every element is written in place, in the parameter's dtype. Padding rows of the vocabulary become
            0.
        folder: folder of config.json and the safetensors files.
        arch: the folder's architecture.
        tp_rank: tensor-parallel rank of the parameters.
        tp_size: tensor-parallel size.
        experts: the experts among the parameters, and the shards of them.

    Raises:
        WeightError: as `open_weights`; a parameter has no counterpart, or not its counterpart's shape; a value is not
            finite, as stored or in the parameter's type. Nothing has been written then, except for the last.
    """
    parameters, source = weight_map(arch), open_weights(folder, arch)
    check_local(parameters, {name: tuple(tensor.shape) for name, tensor in local_params.items()}, tp_size, experts)
    for name, local in local_params.items():
        is_expert = parameters[name].expert is not None
        rank, size = (experts.tensor_rank, experts.tensor_size) if is_expert else (tp_rank, tp_size)
        _fill(local.detach(), parameters[name], source, rank, size)


def _fill(local: Tensor, parameter: Parameter, source: SafetensorsFolder, rank: int, size: int) -> None:
    names, dim, filled = list(parameter.tensors), parameter.layout.dim, 0
    for piece in parameter.pieces(rank, size):
        target = local.narrow(dim, filled, piece.length)
        if piece.source is None:
            target.zero_()
        else:
            name = names[piece.source]
            target.copy_(source.read(name, dim, piece.start, piece.length))
            check_finite(target, name, source.file_of(name))
        filled += piece.length
