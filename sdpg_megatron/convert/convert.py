"""Conversion in both directions: streamed, proven before it is put in place, whole or absent."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.checkpoint.files import find_damage, flush_tree
from sdpg_megatron.checkpoint.state import check_same_model, fingerprint
from sdpg_megatron.convert.arguments import arguments_of, check_arguments, checkpoint_arguments
from sdpg_megatron.convert.roundtrip_check import THREADS, Spec, check_same_tensors
from sdpg_megatron.convert.safetensors_file import write_safetensors
from sdpg_megatron.convert.source import HF_ASSETS_FOLDER, RELEASE, TRACKER_FILE, Source
from sdpg_megatron.convert.tensor_locations import Stored, extra_states, stored_parameters
from sdpg_megatron.convert.tensors import CheckpointTensors, FolderTensors, Tensors, blocks
from sdpg_megatron.convert.torch_dist import TorchDist
from sdpg_megatron.convert.torch_dist_writer import Block, write_torch_dist
from sdpg_megatron.errors import CheckpointError, ConversionError, fix_of
from sdpg_megatron.observe.byte_progress import transfer
from sdpg_megatron.weights.bucket import TensorSpec, in_buckets
from sdpg_megatron.weights.folder import copy_hf_assets, shard_name, write_config, write_index
from sdpg_megatron.weights.map import hf_shapes

Moved = Callable[[int], None]
"""Told how many bytes more have been written, or read back."""
Check = Callable[[Path], None]
"""Given what was written, before it is put in place; may raise."""

Specs = Mapping[str, Spec]


def to_megatron(
    source: Path, target: Path, *, dtype: torch.dtype | None, check: Check | None = None, console: Console
) -> None:
    """Make a Megatron checkpoint of a Hugging Face folder.

    The tensors in it are whole, so that it can be loaded under any layout. One block of rows is held at a time.

    Args:
        source: with config.json, safetensors, tokenizer.
        target: the folder to make.
        dtype: type of the weights; None for that of each in the folder.
        check: also looks at the folder of the tensors.
        console: where progress is shown.

    Raises:
        ConversionError: `target` is there already, or what was written is not what was read.
        ConfigError, WeightError: the folder is damaged, or no model that is supported.
    """
    arch = read_architecture(source)
    tensors = FolderTensors(source, arch)
    parameters = stored_parameters(arch)
    types = {stored.names: _type_of(stored, tensors, dtype) for stored in parameters}
    main_type = types[parameters[0].names]
    specs = _specs(tensors, dtype)
    with _aside(target) as aside:
        written = aside / RELEASE
        written.mkdir()
        with transfer(f"{source} -> {target}", _bytes(specs), console, passes=2) as moved:
            write_torch_dist(
                written,
                [block for stored in parameters for block in _blocks(stored, tensors, types[stored.names], moved)],
                extra_states(parameters),
                {"args": checkpoint_arguments(arch, main_type), "checkpoint_version": 3.0, "iteration": 0},
            )
            hf_assets = aside / HF_ASSETS_FOLDER
            hf_assets.mkdir()
            write_config(source, hf_assets, _name(main_type))
            copy_hf_assets(source, hf_assets)
            (aside / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
            with _flushing(aside):
                _prove_megatron(written, read_architecture(hf_assets), source, specs, moved)
        if check is not None:
            check(written)


def to_hugging_face(
    source: Source,
    target: Path,
    *,
    like: Path | None,
    dtype: torch.dtype | None,
    shard_bytes: int,
    check: Check | None = None,
    console: Console,
) -> None:
    """Make a Hugging Face folder of a Megatron checkpoint, this trainer's or Megatron-LM's own.

    Args:
        source: where the checkpoint is.
        target: the folder to make.
        like: Hugging Face folder of the same architecture, for config.json, tokenizer and templates; None for the one
            that the checkpoint was made of or its run was started from.
        dtype: type of the weights; None for that of each in the checkpoint.
        shard_bytes: bound of one safetensors file; a larger tensor has one to itself.
        check: also looks at the folder.
        console: where progress is shown.

    Raises:
        ConversionError: `target` is there already, no config.json is known or it tells of another model, or what was
            written is not what was read.
        CheckpointError: the checkpoint is damaged; a run's is held against its digests first.
        ConfigError: config.json is of no model that is supported, or `like` is not what the run was started from.
    """
    folder = like or source.hf_assets
    if folder is None:
        expected = "the config.json and tokenizer of the model in it"
        raise ConversionError(str(source.folder), "weights alone", expected, "name a folder with them: --like FOLDER")
    arch = read_architecture(folder)
    _check_config(source, folder, arch)
    _check_digests(source, console)
    tensors = _open_checkpoint(source.folder, arch)
    specs = _specs(tensors, dtype)
    with _aside(target) as aside:
        with transfer(f"{source.folder} -> {target}", _bytes(specs), console, passes=2) as moved:
            _write_files(aside, specs, tensors, shard_bytes, moved)
            write_config(folder, aside, _name(next(iter(specs.values()))[1]))
            copy_hf_assets(folder, aside)
            with _flushing(aside):
                _check_same_architecture(read_architecture(aside), arch, target / "config.json")
                checkpoint = partial(_open_checkpoint, source.folder, arch)
                check_same_tensors(checkpoint, partial(FolderTensors, aside, arch), specs, target, moved)
        if check is not None:
            check(aside)


def _specs(tensors: Tensors, dtype: torch.dtype | None) -> Specs:
    """Shape of every tensor, and the type that it is to have."""
    return {name: (shape, dtype or tensors.dtype(name)) for name, shape in hf_shapes(tensors.arch).items()}


def _bytes(specs: Specs) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` where nothing is raised, and is gone otherwise."""
    if target.exists():
        raise ConversionError(str(target), "something there already", "a new path", "choose another, or remove it")
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(target)
        found = error.strerror or str(error)
        raise ConversionError(where, found, "a disk that reads and takes it", fix_of(error, Path(where))) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _flushing(folder: Path) -> Iterator[None]:
    """Have the disk keep all that is in a folder, while it is read; done when this is left."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        flushed = thread.submit(flush_tree, folder)
        yield
        flushed.result()


def _type_of(stored: Stored, tensors: Tensors, dtype: torch.dtype | None) -> torch.dtype:
    """Type of a parameter, whose tensors have to agree on one."""
    found = {tensors.dtype(name) for name in stored.parameter.tensors}
    if dtype is None and len(found) > 1:
        names = ", ".join(stored.parameter.tensors)
        raise ConversionError(names, f"the types {sorted(map(str, found))}", "one", "choose one: --dtype")
    return dtype or found.pop()


def _blocks(stored: Stored, tensors: Tensors, dtype: torch.dtype, moved: Moved) -> Iterator[Block]:
    place = stored.canonical_place()
    for start, length in blocks(stored.shape, dtype.itemsize):

        def make(start: int = start, length: int = length) -> Tensor:
            rows = _parameter_rows(stored, tensors, start, length, dtype)
            moved(rows.nbytes)
            return rows

        yield Block(place.key, (*place.lead, *stored.shape), dtype, place.at, start, length, make)


def _parameter_rows(stored: Stored, tensors: Tensors, start: int, length: int, dtype: torch.dtype) -> Tensor:
    """Rows of a Megatron parameter, from the Hugging Face tensors that it is made of."""
    found = torch.empty(length, *stored.shape[1:], dtype=dtype)
    for run in stored.runs():
        first, last = max(start, run.start), min(start + length, run.start + run.length)
        if first >= last:
            continue
        if last - first == length and run.tensor is not None:
            return tensors.rows(run.tensor, run.tensor_start + first - run.start, length).to(dtype)
        target = found[first - start : last - start]
        if run.tensor is None:
            target.zero_()
        else:
            target.copy_(tensors.rows(run.tensor, run.tensor_start + first - run.start, last - first))
    return found


def _prove_megatron(written: Path, arch: Architecture, source: Path, specs: Specs, moved: Moved) -> None:
    """Read back what was written: arguments, config.json and every tensor."""
    check_arguments(arguments_of(TorchDist(written)), arch, f"{written}: args")
    _check_same_architecture(arch, read_architecture(source), written.parent / HF_ASSETS_FOLDER)
    check_same_tensors(
        partial(FolderTensors, source, arch), partial(_open_checkpoint, written, arch), specs, written, moved
    )


def _check_same_architecture(found: Architecture, expected: Architecture, where: Path) -> None:
    """Hold what was written of a config.json against what was read, field by field."""
    for field in dataclasses.fields(Architecture):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if one != other:
            raise ConversionError(f"{where}: {field.name}", repr(one), f"{other!r}, the source's", "report this")


def _open_checkpoint(folder: Path, arch: Architecture) -> CheckpointTensors:
    return CheckpointTensors(TorchDist(folder), arch)


def _check_config(source: Source, folder: Path, arch: Architecture) -> None:
    """Hold a config.json against what the checkpoint says of its model."""
    if source.state is not None:
        check_same_model(source.state, fingerprint(folder))
        return
    check_arguments(arguments_of(TorchDist(source.folder)), arch, f"{source.folder}: args")


def _check_digests(source: Source, console: Console) -> None:
    """Hold the files of a run's checkpoint against its manifest: what is read back is compared with what they are."""
    if source.state is None:
        return
    files = source.state.files
    total = sum(file.bytes for file in files.values())
    with transfer(f"{source.folder}: digests", total, console) as looked:
        damage = find_damage(source.folder, files, digests=True, threads=THREADS, looked=looked)
        if damage is not None:
            raise CheckpointError(f"{damage}. Fix: bring the file back, or convert another checkpoint") from damage


def _write_files(folder: Path, specs: Specs, tensors: Tensors, shard_bytes: int, moved: Moved) -> None:
    """Write the safetensors files, and their index where there are several."""

    def rows(name: str) -> Iterator[Tensor]:
        shape, dtype = specs[name]
        for start, length in blocks(shape, max(dtype.itemsize, tensors.dtype(name).itemsize)):
            block = tensors.rows(name, start, length).to(dtype)
            moved(block.nbytes)
            yield block

    files = _files(specs, shard_bytes)
    for file, names in files.items():
        write_safetensors(folder / file, {name: specs[name] for name in names}, rows)
    if len(files) > 1:
        write_index(folder, {name: file for file, names in files.items() for name in names}, _bytes(specs))


def _files(specs: Specs, shard_bytes: int) -> dict[str, list[str]]:
    """Names of each file's tensors."""
    shards = list(in_buckets((TensorSpec(name, dtype, shape) for name, (shape, dtype) in specs.items()), shard_bytes))
    return {
        shard_name(number, len(shards)): [spec.name for spec in shard] for number, shard in enumerate(shards, start=1)
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
