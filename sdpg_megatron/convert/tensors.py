"""A model's tensors by Hugging Face names, read by rows from a folder or a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.convert.tensor_locations import Stored, TensorLocation, model_keys, stored_parameters
from sdpg_megatron.convert.torch_dist import TorchDist
from sdpg_megatron.errors import ConversionError, did_you_mean
from sdpg_megatron.weights.load import open_weights
from sdpg_megatron.weights.map import Shape, hf_shapes

BLOCK_BYTES = 16 * 2**20
"""Largest block that is read, converted and written at a time; a longer row is a block by itself."""


class Tensors(Protocol):
    """A model's tensors, read by rows."""

    arch: Architecture

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        ...

    def rows(self, name: str, start: int, length: int) -> Tensor:
        """Rows of a tensor, as stored."""
        ...


def blocks(shape: Shape, itemsize: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of the blocks of a tensor with elements of `itemsize` bytes."""
    rows = max(1, BLOCK_BYTES // max(1, prod(shape[1:]) * itemsize))
    return ((start, min(rows, shape[0] - start)) for start in range(0, shape[0], rows))


class FolderTensors:
    """Tensors of a Hugging Face folder, checked against the names and shapes of its config.json."""

    def __init__(self, folder: Path, arch: Architecture) -> None:
        """Open the folder. Raises `WeightError` if it is damaged or does not fit its config.json."""
        self.arch = arch
        self._source = open_weights(folder, arch)
        self._dtypes = {name: self._source.dtype(name) for name in hf_shapes(arch)}
        self._mapped = 0

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def rows(self, name: str, start: int, length: int) -> Tensor:
        found = self._source.read(name, 0, start, length)
        self._mapped += found.nbytes
        if self._mapped >= BLOCK_BYTES:  # unmap, or all pages read would count as this process's memory
            self._source.close()
            self._mapped = 0
        return found


class CheckpointTensors:
    """Tensors of a Megatron checkpoint, assembled from megatron-core's keys."""

    def __init__(self, source: TorchDist, arch: Architecture) -> None:
        """
        Raises:
            ConversionError: a parameter is missing, has another shape, or is not part of the model.
            CheckpointError: a file is missing or truncated.
        """
        self.arch = arch
        self._source = source
        for fault in source.faults():
            raise fault
        self._owner: dict[str, tuple[Stored, TensorLocation]] = {}
        for stored in stored_parameters(arch):
            location = self._find(stored)
            self._owner |= dict.fromkeys(stored.parameter.tensors, (stored, location))
        self._check_all_used()

    def dtype(self, name: str) -> torch.dtype:
        return self._source.tensors[self._owner[name][1].key].properties.dtype

    def rows(self, name: str, start: int, length: int) -> Tensor:
        stored, location = self._owner[name]
        parts = []
        for run in stored.runs():
            first = max(start, run.tensor_start)
            last = min(start + length, run.tensor_start + run.length)
            if run.tensor == name and first < last:
                row = run.start + first - run.tensor_start
                parts.append((first, self._source.rows(location.key, location.indices, row, last - first)))
        if len(parts) == 1:
            return parts[0][1]
        return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])

    def _find(self, stored: Stored) -> TensorLocation:
        keys = self._source.tensors
        for location in stored.locations():
            if location.key in keys:
                self._check_shape(stored, location, tuple(keys[location.key].size))
                return location
        wanted = stored.canonical_location().key
        hint = did_you_mean(wanted, model_keys(keys))
        where, expected = str(self._source.folder), f"the parameter of {', '.join(stored.parameter.tensors)}"
        raise ConversionError(where, f"no tensor {wanted!r}", expected, hint or "convert with the model's config.json")

    def _check_shape(self, stored: Stored, location: TensorLocation, found: Shape) -> None:
        expected = (*location.lead, *stored.shape)
        rows = len(location.lead)
        padded = stored.is_vocabulary and len(found) == 2 and found[0] >= self.arch.vocab_size
        if found != expected and not (padded and found[1:] == expected[1:]):
            dims = "[layers, ...]" if rows == 1 else "[layers, experts, ...]" if rows else "[rows, ...]"
            raise ConversionError(
                f"{self._source.folder}: tensor {location.key!r}",
                list(found),
                f"{list(expected)} ({dims}), as in config.json",
                "convert with the config.json that the model was trained with",
            )

    def _check_all_used(self) -> None:
        used = {location.key for _, location in self._owner.values()}
        if extra := sorted(set(model_keys(self._source.tensors)) - used):
            raise ConversionError(
                f"{self._source.folder}: tensor {extra[0]!r}",
                "not part of the model of config.json",
                f"only parameters of {self.arch.family}",
                "convert with the config.json that the model was trained with",
            )
