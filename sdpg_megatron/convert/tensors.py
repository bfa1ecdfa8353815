"""The tensors of a model under their Hugging Face names, from a folder or out of a Megatron checkpoint, by rows."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.convert.tensor_locations import Stored, TensorLocation, of_the_model, stored_parameters
from sdpg_megatron.convert.torch_dist import TorchDist
from sdpg_megatron.errors import ConversionError, did_you_mean
from sdpg_megatron.weights.load import open_weights
from sdpg_megatron.weights.map import Shape, hf_shapes

BLOCK_BYTES = 16 * 2**20
"""Bound of what is read, turned and written at a time; a longer row is a block of its own."""


class Tensors(Protocol):
    """A model's tensors, none of which is ever held whole."""

    arch: Architecture

    def dtype(self, name: str) -> torch.dtype:
        """Type as stored."""
        ...

    def rows(self, name: str, start: int, length: int) -> Tensor:
        """Rows of a tensor, as stored."""
        ...


def blocks(shape: Shape, itemsize: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of the blocks of a tensor with elements of `itemsize` bytes."""
    rows = max(1, BLOCK_BYTES // max(1, prod(shape[1:]) * itemsize))
    return ((start, min(rows, shape[0] - start)) for start in range(0, shape[0], rows))


class FolderTensors:
    """Those of a Hugging Face folder, all of whose files are there, with the tensors and shapes of its config.json."""

    def __init__(self, folder: Path, arch: Architecture) -> None:
        """Raises `WeightError` where the folder is damaged, or its config.json tells of another model."""
        self.arch = arch
        self._source = open_weights(folder, arch)
        self._dtypes = {name: self._source.dtype(name) for name in hf_shapes(arch)}
        self._mapped = 0

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def rows(self, name: str, start: int, length: int) -> Tensor:
        found = self._source.read(name, 0, start, length)
        self._mapped += found.nbytes
        if self._mapped >= BLOCK_BYTES:  # or the system would count all that was read as this process's memory
            self._source.close()
            self._mapped = 0
        return found


class CheckpointTensors:
    """Those of a Megatron checkpoint, each found at the places where megatron-core keeps its parts."""

    def __init__(self, source: TorchDist, arch: Architecture) -> None:
        """
        Raises:
            ConversionError: a parameter of the model is missing or has another shape, or one is there that it has no
                place for.
            CheckpointError: a file is missing or too short.
        """
        self.arch = arch
        self._source = source
        for fault in source.faults():
            raise fault
        self._owner: dict[str, tuple[Stored, TensorLocation]] = {}
        for stored in stored_parameters(arch):
            place = self._find(stored)
            self._owner |= dict.fromkeys(stored.parameter.tensors, (stored, place))
        self._check_all_used()

    def dtype(self, name: str) -> torch.dtype:
        return self._source.tensors[self._owner[name][1].key].properties.dtype

    def rows(self, name: str, start: int, length: int) -> Tensor:
        stored, place = self._owner[name]
        parts = []
        for run in stored.runs():
            first = max(start, run.tensor_start)
            last = min(start + length, run.tensor_start + run.length)
            if run.tensor == name and first < last:
                at = run.start + first - run.tensor_start
                parts.append((first, self._source.rows(place.key, place.at, at, last - first)))
        if len(parts) == 1:
            return parts[0][1]
        return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])

    def _find(self, stored: Stored) -> TensorLocation:
        keys = self._source.tensors
        for place in stored.places():
            if place.key in keys:
                self._check_shape(stored, place, tuple(keys[place.key].size))
                return place
        wanted = stored.canonical_place().key
        hint = did_you_mean(wanted, of_the_model(keys))
        where, expected = str(self._source.folder), f"the parameter of {', '.join(stored.parameter.tensors)}"
        raise ConversionError(where, f"no tensor {wanted!r}", expected, hint or "convert with the model's config.json")

    def _check_shape(self, stored: Stored, place: TensorLocation, found: Shape) -> None:
        expected = (*place.lead, *stored.shape)
        rows = len(place.lead)
        padded = stored.is_vocabulary and len(found) == 2 and found[0] >= self.arch.vocab_size
        if found != expected and not (padded and found[1:] == expected[1:]):
            what = "[layers, ...]" if rows == 1 else "[layers, experts, ...]" if rows else "[rows, ...]"
            raise ConversionError(
                f"{self._source.folder}: tensor {place.key!r}",
                list(found),
                f"{list(expected)} ({what}), as config.json says",
                "convert with the config.json that the model was trained with",
            )

    def _check_all_used(self) -> None:
        used = {place.key for _, place in self._owner.values()}
        if extra := sorted(set(of_the_model(self._source.tensors)) - used):
            raise ConversionError(
                f"{self._source.folder}: tensor {extra[0]!r}",
                "no place for it in the model of config.json",
                f"only parameters of {self.arch.family}",
                "convert with the config.json that the model was trained with",
            )
