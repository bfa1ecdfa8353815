"""Weight streams into a Hugging Face folder, which appears whole or not at all, and out of one."""

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
from sdpg_megatron.weights.check import check_finite
from sdpg_megatron.weights.load import INDEX_FILE, SINGLE_FILE, open_weights
from sdpg_megatron.weights.map import check_folder, hf_shapes
from sdpg_megatron.weights.stream import Bucket


def write_folder(buckets: Iterable[Bucket], target: Path, *, source_folder: Path, shard_bytes: int = 4 * 2**30) -> None:
    """Write a model's weights, with everything else from the folder that it came from.

    The folder is written aside and renamed when it is complete. An earlier model at `target` is replaced; until then it
    stays as it is, and after an error too.

    Args:
        buckets: the leader's side of a weight stream; its tensors' type becomes the configuration's.
        target: the folder to make.
        source_folder: Hugging Face folder with the model's config.json, tokenizer and templates.
        shard_bytes: bound of one safetensors file, and of the host memory that this takes beside a bucket.

    Raises:
        WeightError: `target` holds something that is not a model, or is `source_folder`; or the stream lacks a tensor
            or has values that are not finite.
        ConfigError: `source_folder` has no usable config.json.
        OSError: the disk refused.
    """
    _check_target(target, source_folder)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        dtype = _write_weights(buckets, aside, source_folder, shard_bytes)
        write_config(source_folder, aside, dtype)
        copy_hf_assets(source_folder, aside)
        _replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_folder(
    folder: Path, *, bucket_bytes: int, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Iterator[Bucket]:
    """A Hugging Face folder's weights as a stream, tied copies left out; one bucket is held at a time.

    Args:
        folder: with config.json and safetensors.
        bucket_bytes: bound of a bucket; a larger tensor has one to itself.
        dtype: type of the tensors; None for that of each in the folder.
        device: where they are to be; None for the CPU.

    Raises:
        WeightError: as `open_weights`; or a value is not finite, as stored or in `dtype`.
        ConfigError: no usable config.json.
    """
    arch = read_architecture(folder)
    source = open_weights(folder, arch)
    bucket: list[tuple[str, Tensor]] = []
    held = 0
    for name in hf_shapes(arch):
        tensor = source.read(name, 0, 0, source.shape(name)[0]).to(device=device, dtype=dtype)
        check_finite(tensor, name, source.file_of(name))
        if bucket and held + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += tensor.nbytes
    yield bucket


def _check_target(target: Path, source_folder: Path) -> None:
    if target.resolve() == source_folder.resolve():
        raise WeightError(f"{target}: would overwrite the model that training started from. Fix: choose another folder")
    if target.exists() and not (target / "config.json").is_file() and not (target.is_dir() and _is_empty(target)):
        raise WeightError(f"{target}: holds something that is not a model. Fix: choose another folder, or empty it")


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


def _write_weights(buckets: Iterable[Bucket], folder: Path, source_folder: Path, shard_bytes: int) -> str:
    """Write the safetensors files, and their index where there are several. Returns the tensors' type."""
    file_of: dict[str, int] = {}
    total, dtype, number = 0, "", 0
    for number, shard in enumerate(_shards(buckets, shard_bytes), start=1):
        for name, tensor in shard.items():
            check_finite(tensor, name, "weight stream", "export an earlier checkpoint, whose weights are finite")
        _save(shard, folder / str(number))
        file_of.update(dict.fromkeys(shard, number))
        total += sum(tensor.nbytes for tensor in shard.values())
        dtype = dtype or str(next(iter(shard.values())).dtype).removeprefix("torch.")
    check_folder(read_architecture(source_folder), file_of, "weight stream")
    if number == 1:
        (folder / "1").rename(folder / SINGLE_FILE)
        return dtype
    names = {index: f"model-{index:05}-of-{number:05}.safetensors" for index in range(1, number + 1)}
    for index, name in names.items():
        (folder / str(index)).rename(folder / name)
    write_index(folder, {tensor: names[index] for tensor, index in file_of.items()}, total)
    return dtype


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's wrapper of the system's reason
        raise OSError(str(error)) from error


def write_index(folder: Path, file_of: Mapping[str, str], total: int) -> None:
    """Say which file has each tensor; `total` bytes are in them."""
    weight_map = dict(sorted(file_of.items()))
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(buckets: Iterable[Bucket], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Regroup a stream into files, on the host."""
    shard: dict[str, Tensor] = {}
    held = 0
    for bucket in buckets:
        for name, tensor in bucket:
            if shard and held + tensor.nbytes > shard_bytes:
                yield shard
                shard, held = {}, 0
            shard[name] = tensor.cpu()
            held += tensor.nbytes
    if shard:
        yield shard


def copy_hf_assets(source_folder: Path, folder: Path) -> None:
    """Copy what a model has beside weights and config.json: tokenizer, chat template, generation defaults."""
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


def _replace(aside: Path, target: Path) -> None:
    """Put the finished folder in place. Renaming cannot replace a folder that has content: that one steps aside."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
