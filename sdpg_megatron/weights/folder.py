"""Weight streams to and from Hugging Face folders; a written folder appears complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.hf_files import HF_ASSETS
from sdpg_megatron.weights.bucket import Bucket, TensorSpec, in_buckets
from sdpg_megatron.weights.load import INDEX_FILE, SINGLE_FILE, check_finite, open_weights
from sdpg_megatron.weights.map import check_folder, hf_shapes


class FolderWriter:
    """Writes a model's weights, and all else from the folder that training started from, as a Hugging Face folder.

    Files are written to a staging folder beside `target`, which `finish` renames. An earlier model at `target` stays
    until then, also after an error.
    """

    def __init__(self, target: Path, *, source_folder: Path, shard_bytes: int = 4 * 2**30) -> None:
        """
        Args:
            target: the folder to make.
            source_folder: Hugging Face folder with the model's config.json, tokenizer and templates.
            shard_bytes: bound of one safetensors file, and of the host memory held beside a bucket.

        Raises:
            WeightError: `target` holds something that is not a model, or is `source_folder`.
            OSError: the staging folder cannot be made.
        """
        _check_target(target, source_folder)
        self._target, self._source_folder, self._shard_bytes = target, source_folder, shard_bytes
        self._staging = target.with_name(f".{target.name}.partial")
        self._shard: dict[str, Tensor] = {}
        self._held = self._total = self._files = 0
        self._file_of: dict[str, int] = {}
        self._dtype = ""
        self.discard()
        self._staging.mkdir(parents=True)

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors; keeps references to those on the CPU until their file is written.

        Raises:
            WeightError: a value is not finite.
            OSError: the disk refused.
        """
        for name, tensor in tensors:
            if self._shard and self._held + tensor.nbytes > self._shard_bytes:
                self._write_shard()
            check_finite(tensor, name, "weight stream", "export an earlier checkpoint, whose weights are finite")
            self._dtype = self._dtype or str(tensor.dtype).removeprefix("torch.")
            self._shard[name] = tensor.cpu()
            self._held += tensor.nbytes

    def finish(self) -> None:
        """Write the rest, config.json with the tensors' type, and the assets; then rename the staging folder.

        Raises:
            WeightError: a tensor is missing or unknown.
            ConfigError: `source_folder` has no usable config.json.
            OSError: the disk refused.
        """
        if self._shard:
            self._write_shard()
        check_folder(read_architecture(self._source_folder), self._file_of, "weight stream")
        names = {number: shard_name(number, self._files) for number in range(1, self._files + 1)}
        for number, name in names.items():
            (self._staging / str(number)).rename(self._staging / name)
        if self._files > 1:
            write_index(self._staging, {name: names[number] for name, number in self._file_of.items()}, self._total)
        write_config(self._source_folder, self._staging, self._dtype)
        copy_hf_assets(self._source_folder, self._staging)
        _replace(self._staging, self._target)

    def discard(self) -> None:
        """Remove the staging folder, if it is still there."""
        self._shard = {}
        shutil.rmtree(self._staging, ignore_errors=True)

    def _write_shard(self) -> None:
        self._files += 1
        try:
            save_file(self._shard, self._staging / str(self._files), metadata={"format": "pt"})
        except SafetensorError as error:  # the library's wrapper of the system's reason
            raise OSError(str(error)) from error
        self._file_of |= dict.fromkeys(self._shard, self._files)
        self._total += self._held
        self._shard, self._held = {}, 0


def write_folder(
    buckets: Iterable[Iterable[tuple[str, Tensor]]],
    target: Path,
    *,
    source_folder: Path,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Write the leader's side of a weight stream; see `FolderWriter` for arguments and errors."""
    writer = FolderWriter(target, source_folder=source_folder, shard_bytes=shard_bytes)
    try:
        for bucket in buckets:
            writer.add(bucket)
        writer.finish()
    finally:
        writer.discard()


def read_folder(
    folder: Path, *, bucket_bytes: int, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Iterator[Bucket]:
    """Read a Hugging Face folder's weights as a stream, without tied copies; one bucket is held at a time.

    Args:
        folder: with config.json and safetensors.
        bucket_bytes: bound of a bucket; a larger tensor has one to itself.
        dtype: type of the tensors; None for each tensor's stored type.
        device: device of the tensors; None for the CPU.

    Raises:
        WeightError: as `open_weights`; or a value is not finite, as stored or in `dtype`.
        ConfigError: no usable config.json.
    """
    arch = read_architecture(folder)
    source = open_weights(folder, arch)
    specs = (TensorSpec(name, dtype or source.dtype(name), shape) for name, shape in hf_shapes(arch).items())
    for group in in_buckets(specs, bucket_bytes):
        bucket = Bucket(group, device)
        for name, tensor in bucket:
            tensor.copy_(source.read(name, 0, 0, len(tensor)))
            check_finite(tensor, name, source.file_of(name))
        yield bucket
        del bucket


def shard_name(number: int, count: int) -> str:
    """File name of safetensors file `number`, from 1, of `count`."""
    return SINGLE_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _check_target(target: Path, source_folder: Path) -> None:
    if target.resolve() == source_folder.resolve():
        raise WeightError(f"{target}: would overwrite the model that training started from. Fix: choose another folder")
    if target.exists() and not (target / "config.json").is_file() and not (target.is_dir() and _is_empty(target)):
        raise WeightError(f"{target}: holds something that is not a model. Fix: choose another folder, or empty it")


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def write_index(folder: Path, file_of: Mapping[str, str], total: int) -> None:
    """Write the index of tensors by file; `total` is the bytes of all tensors."""
    weight_map = dict(sorted(file_of.items()))
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_hf_assets(source_folder: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation defaults and the other files beside weights and config.json."""
    for name in HF_ASSETS:
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, folder / name)


def write_config(source_folder: Path, folder: Path, dtype: str) -> None:
    """Write a model's config.json with another type of the weights."""
    config = json.loads((source_folder / "config.json").read_text(encoding="utf-8"))
    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; both read the older name.
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _replace(staging: Path, target: Path) -> None:
    """Rename the finished folder. An existing target is renamed first, as a folder with content cannot be replaced."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)
