"""Hugging Face safetensors into Megatron shards: each rank reads only the slices that it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import WeightError, reason_of
from sdpg_megatron.hf_files import check_file
from sdpg_megatron.weights.check import check_finite, check_stored_shapes
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
"""Types of weights, by their names in safetensors."""


class SafetensorsFolder:
    """Slices of the tensors in a Hugging Face folder. Files are mapped, not read, and only those that are asked for."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            WeightError: the folder has neither a single file nor an index, or one that cannot be read.
            ConfigError: a file is a Git LFS pointer, empty, or a link to nothing; so do all methods that read.
        """
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of = self._find_files()

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    @property
    def where(self) -> Path:
        """The file that says which tensors there are."""
        single = self.folder / SINGLE_FILE
        return single if set(self._file_of.values()) == {SINGLE_FILE} else self.folder / INDEX_FILE

    def file_of(self, name: str) -> Path:
        return self.folder / self._file_of[name]

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises `WeightError` where it is no type of weights: quantized ones have scales that the maps do not know."""
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
        index = (slice(None),) * dim + (slice(start, start + length),)
        part: Tensor = self._slice(name)[index]
        return part

    def close(self) -> None:
        """Let go of the files, and of what the system has mapped of them; they are opened again when needed."""
        self._handles.clear()

    def check(self) -> None:
        """Raises `WeightError` where a file is missing or damaged, or lacks what the index says that it has."""
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


def open_weights(folder: Path, arch: Architecture) -> SafetensorsFolder:
    """Open a Hugging Face folder's weights, and check names, files, shapes and types. Only headers are read.

    Raises:
        WeightError: a file is missing or damaged; a tensor is missing, has another shape than config.json gives it or a
            type that is not supported; or one is there that the model has no place for.
    """
    source = SafetensorsFolder(folder)
    check_folder(arch, source.names, str(source.where))
    source.check()
    names = hf_shapes(arch)
    check_stored_shapes(arch, source, names)
    for name in names:
        source.dtype(name)
    return source


def check_values(folder: Path, arch: Architecture) -> None:
    """Check that every value of a folder's weights is finite. All of them are read, one tensor at a time.

    Raises:
        WeightError: as `open_weights`; or naming the first tensor with a value that is not finite, and its file.
    """
    source = open_weights(folder, arch)
    for name in hf_shapes(arch):
        check_finite(source.read(name, 0, 0, source.shape(name)[0]), name, source.file_of(name))


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
        local_params: the rank's parameters under their Megatron names with global numbers of layers and experts, on any
            device; written in place, every element of each, in its own dtype. Rows that pad the vocabulary become 0.
        folder: config.json's folder, with one safetensors file or several and their index.
        arch: the folder's architecture.
        tp_rank: which shard of `tp_size` the parameters are.
        tp_size: tensor-parallel size.
        experts: which experts are among the parameters, and which shards of them.

    Raises:
        WeightError: as `open_weights`; a parameter has no counterpart, or not its counterpart's shape; a value is not
            finite, as stored or in the parameter's type. Nothing was written then, except for the last.
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


def _file_names(weight_map: Any) -> dict[str, str]:
    """An index's table, each of its files in the index's own folder."""
    if not isinstance(weight_map, dict):
        raise TypeError(f"weight_map is a {type(weight_map).__name__}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ValueError(f"weight_map: {name}: found {file!r}, expected the name of a file of the folder")
    return weight_map
