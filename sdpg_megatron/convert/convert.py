"""Streamed conversion in both directions. The result is verified before it is renamed to the target."""

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
"""Called with the number of bytes that were written or read back."""
Check = Callable[[Path], None]
"""Called with the written folder before it is renamed; may raise."""

Specs = Mapping[str, Spec]


def to_megatron(
    source: Path, target: Path, *, dtype: torch.dtype | None, check: Check | None = None, console: Console
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint.

    Its tensors are unsharded, so it can be loaded under any layout. One block of rows is in memory at a time.

    Args:
        source: folder with config.json, safetensors and tokenizer.
        target: folder to create.
        dtype: dtype of the weights; None keeps the source's.
        check: further check of the written tensors.
        console: for progress.

    Raises:
        ConversionError: `target` exists, or the written tensors differ from the source's.
        ConfigError, WeightError: the folder is damaged, or its model is not supported.
    """
    arch = read_architecture(source)
    tensors = FolderTensors(source, arch)
    parameters = stored_parameters(arch)
    types = {stored.names: _type_of(stored, tensors, dtype) for stored in parameters}
    main_type = types[parameters[0].names]
    specs = _specs(tensors, dtype)
    with _staging(target) as staging:
        written = staging / RELEASE
        written.mkdir()
        with transfer(f"{source} -> {target}", _bytes(specs), console, passes=2) as moved:
            write_torch_dist(
                written,
                [block for stored in parameters for block in _blocks(stored, tensors, types[stored.names], moved)],
                extra_states(parameters),
                {"args": checkpoint_arguments(arch, main_type), "checkpoint_version": 3.0, "iteration": 0},
            )
            hf_assets = staging / HF_ASSETS_FOLDER
            hf_assets.mkdir()
            write_config(source, hf_assets, _name(main_type))
            copy_hf_assets(source, hf_assets)
            (staging / TRACKER_FILE).write_text(RELEASE, encoding="utf-8")
            with _flushing(staging):
                _verify_megatron(written, read_architecture(hf_assets), source, specs, moved)
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
    """Convert a Megatron checkpoint, of this trainer or of Megatron-LM, to a Hugging Face folder.

    Args:
        source: the checkpoint.
        target: folder to create.
        like: Hugging Face folder of the same architecture, for config.json, tokenizer and templates; None for the one
            from which the checkpoint was converted or its run started.
        dtype: dtype of the weights; None keeps the checkpoint's.
        shard_bytes: largest safetensors file; a larger tensor gets a file by itself.
        check: further check of the written folder.
        console: for progress.

    Raises:
        ConversionError: `target` exists, config.json is missing or of another model, or the written tensors differ from
            the source's.
        CheckpointError: the checkpoint is damaged; a run's digests are verified first.
        ConfigError: config.json is of an unsupported model, or `like` is not the model that the run started from.
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
    with _staging(target) as staging:
        with transfer(f"{source.folder} -> {target}", _bytes(specs), console, passes=2) as moved:
            _write_files(staging, specs, tensors, shard_bytes, moved)
            write_config(folder, staging, _name(next(iter(specs.values()))[1]))
            copy_hf_assets(folder, staging)
            with _flushing(staging):
                _check_same_architecture(read_architecture(staging), arch, target / "config.json")
                checkpoint = partial(_open_checkpoint, source.folder, arch)
                check_same_tensors(checkpoint, partial(FolderTensors, staging, arch), specs, target, moved)
        if check is not None:
            check(staging)


def _specs(tensors: Tensors, dtype: torch.dtype | None) -> Specs:
    """Shape and target dtype of every tensor."""
    return {name: (shape, dtype or tensors.dtype(name)) for name, shape in hf_shapes(tensors.arch).items()}


def _bytes(specs: Specs) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Staging folder that is renamed to `target` on success and removed on an error."""
    if target.exists():
        raise ConversionError(str(target), "an existing path", "a new path", "choose another, or remove it")
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(target)
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(target)
        found = error.strerror or str(error)
        raise ConversionError(where, found, "a readable and writable disk", fix_of(error, Path(where))) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _flushing(folder: Path) -> Iterator[None]:
    """Flush a folder to the disk on a thread, while it is read back; done on exit."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        flushed = thread.submit(flush_tree, folder)
        yield
        flushed.result()


def _type_of(stored: Stored, tensors: Tensors, dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of a parameter; its tensors must agree."""
    found = {tensors.dtype(name) for name in stored.parameter.tensors}
    if dtype is None and len(found) > 1:
        names = ", ".join(stored.parameter.tensors)
        raise ConversionError(names, f"the types {sorted(map(str, found))}", "one", "choose one: --dtype")
    return dtype or found.pop()


def _blocks(stored: Stored, tensors: Tensors, dtype: torch.dtype, moved: Moved) -> Iterator[Block]:
    location = stored.canonical_location()
    for start, length in blocks(stored.shape, dtype.itemsize):

        def make(start: int = start, length: int = length) -> Tensor:
            rows = _parameter_rows(stored, tensors, start, length, dtype)
            moved(rows.nbytes)
            return rows

        yield Block(location.key, (*location.lead, *stored.shape), dtype, location.indices, start, length, make)


def _parameter_rows(stored: Stored, tensors: Tensors, start: int, length: int, dtype: torch.dtype) -> Tensor:
    """Rows of a Megatron parameter, assembled from Hugging Face tensors."""
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


def _verify_megatron(written: Path, arch: Architecture, source: Path, specs: Specs, moved: Moved) -> None:
    """Read back arguments, config.json and every tensor, and compare them with the source."""
    check_arguments(arguments_of(TorchDist(written)), arch, f"{written}: args")
    _check_same_architecture(arch, read_architecture(source), written.parent / HF_ASSETS_FOLDER)
    check_same_tensors(
        partial(FolderTensors, source, arch), partial(_open_checkpoint, written, arch), specs, written, moved
    )


def _check_same_architecture(found: Architecture, expected: Architecture, where: Path) -> None:
    """Compare the architecture of the written config.json with the source's, field by field."""
    for field in dataclasses.fields(Architecture):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if one != other:
            raise ConversionError(f"{where}: {field.name}", repr(one), f"{other!r}, the source's", "report this")


def _open_checkpoint(folder: Path, arch: Architecture) -> CheckpointTensors:
    return CheckpointTensors(TorchDist(folder), arch)


def _check_config(source: Source, folder: Path, arch: Architecture) -> None:
    """Compare a config.json with the checkpoint's manifest or arguments."""
    if source.state is not None:
        check_same_model(source.state, fingerprint(folder))
        return
    check_arguments(arguments_of(TorchDist(source.folder)), arch, f"{source.folder}: args")


def _check_digests(source: Source, console: Console) -> None:
    """Verify a run checkpoint's files against its manifest."""
    if source.state is None:
        return
    files = source.state.files
    total = sum(file.bytes for file in files.values())
    with transfer(f"{source.folder}: digests", total, console) as checked:
        damage = find_damage(source.folder, files, digests=True, threads=THREADS, checked=checked)
        if damage is not None:
            raise CheckpointError(f"{damage}. Fix: restore the file, or convert another checkpoint") from damage


def _write_files(folder: Path, specs: Specs, tensors: Tensors, shard_bytes: int, moved: Moved) -> None:
    """Write the safetensors files, and an index if there are several."""

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
