"""Implementation of ``sdpg-megatron inspect``: a path's contents and damage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch

from sdpg_megatron.architecture import Architecture, read_architecture
from sdpg_megatron.checkpoint.files import find_damage
from sdpg_megatron.checkpoint.state import RunState
from sdpg_megatron.convert.arguments import arguments_of, check_arguments
from sdpg_megatron.convert.roundtrip_check import THREADS
from sdpg_megatron.convert.source import Source, find_source
from sdpg_megatron.convert.tensor_locations import model_keys
from sdpg_megatron.convert.tensors import CheckpointTensors, FolderTensors
from sdpg_megatron.convert.torch_dist import TorchDist
from sdpg_megatron.errors import ConversionError, SdpgError
from sdpg_megatron.weights.load import SafetensorsFolder
from sdpg_megatron.weights.map import Shape

T = TypeVar("T")

LAYOUT = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
}
"""Degrees of parallelism, by this package's names and Megatron-LM's arguments. Data parallelism is in neither."""


LISTS = {"branched_from": "branched from", "changes": "change", "damage": "damage"}
"""Fields of a report that are shown as one line per item, with the line's title."""


@dataclass
class Report:
    """Contents of a path. Fields stay None if unknown, or unreadable because of damage."""

    path: str
    kind: str
    model: str | None = None
    """Folder of config.json and tokenizer."""
    family: str | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocabulary: int | None = None
    parameters: int | None = None
    """Elements of the model's tensors as stored: with vocabulary padding, without tied copies."""
    bytes: int | None = None
    dtype: str | None = None
    files: int | None = None
    """Number of files with tensors."""
    step: int | None = None
    layout: str | None = None
    """Parallel layout under which it was written; it can be read under any."""
    training_state: bool | None = None
    """True if it has an optimizer's state."""
    branched_from: list[str] = field(default_factory=list)
    """Branch points of the checkpoint's run and its ancestors, oldest first."""
    changes: list[str] = field(default_factory=list)
    """Configuration changes of the checkpoint's run, each with its step."""
    versions: dict[str, str] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def to_text(self) -> str:
        rows = dataclasses.asdict(self)
        versions = rows.pop("versions")
        lists = [(title, rows.pop(name)) for name, title in LISTS.items()]
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items()) or None
        shown = [(name.replace("_", " "), value) for name, value in rows.items() if value is not None]
        shown += [(title, one) for title, items in lists for one in items]
        return "".join(f"{name:<15}{_shown(value)}\n" for name, value in shown)


def inspect(path: Path, *, digests: bool = False) -> Report:
    """Inspect a Hugging Face folder, a run, a run checkpoint or a Megatron checkpoint, without reading tensors.

    Args:
        digests: read a run checkpoint's files, and compare them with the digests in its manifest.

    Raises:
        ConversionError: the path is none of these, or has no digests.
        CheckpointError: a run checkpoint's manifest is missing or damaged.
    """
    source = find_source(path)
    if digests and source.state is None:
        raise ConversionError("--digests", f"a {source.kind}", "a run checkpoint, which has digests", "leave it out")
    report = Report(str(source.folder), source.kind)
    arch = None
    if source.hf_assets is not None:
        report.model = str(source.hf_assets)
        arch = _attempt(report, read_architecture, source.hf_assets)
    if arch is not None:
        report.family, report.layers, report.hidden = arch.family, arch.num_layers, arch.hidden_size
        report.heads, report.kv_heads, report.vocabulary = arch.num_heads, arch.num_kv_heads, arch.vocab_size
    if source.kind == "Hugging Face folder":
        _attempt(report, _inspect_folder, report, source.folder, arch)
    else:
        _attempt(report, _inspect_checkpoint, report, source, arch, digests)
    return report


def _attempt(report: Report, read: Callable[..., T], *arguments: Any) -> T | None:
    """Call `read`, and record an error as damage."""
    try:
        return read(*arguments)
    except SdpgError as error:
        if str(error) not in report.damage:
            report.damage.append(str(error))
        return None


def _inspect_folder(report: Report, folder: Path, arch: Architecture | None) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if arch is not None else {}
    if version := config.get("transformers_version"):
        report.versions["transformers"] = str(version)
    source = SafetensorsFolder(folder)
    report.files = len({source.file_of(name) for name in source.names})
    if arch is not None:
        _attempt(report, FolderTensors, folder, arch)
    source.check()
    _count(report, ((source.shape(name), source.dtype(name)) for name in source.names))


def _inspect_checkpoint(report: Report, source: Source, arch: Architecture | None, digests: bool) -> None:
    if source.state is not None:
        report.step = source.state.step
        _inspect_manifest(report, source.folder, source.state, digests)
    checkpoint = TorchDist(source.folder)
    report.damage += [str(fault) for fault in checkpoint.faults()]
    model = model_keys(checkpoint.tensors)
    report.files = len(list(source.folder.glob("*.distcp")))
    report.training_state = len(model) < len(checkpoint.tensors)
    _count(report, ((tuple(t.size), t.properties.dtype) for t in (checkpoint.tensors[key] for key in model)))
    if arch is not None and not report.damage:
        _attempt(report, CheckpointTensors, checkpoint, arch)
    if source.state is None:
        _inspect_arguments(report, checkpoint, arch)


def _inspect_manifest(report: Report, folder: Path, state: RunState, digests: bool) -> None:
    report.versions |= {"manifest": str(state.format), **state.versions}
    if damage := find_damage(folder, state.files, digests=digests, threads=THREADS):
        report.damage.append(str(damage))
    report.branched_from, report.changes = list(map(str, state.branches)), list(map(str, state.changes))
    parallel = state.config.get("parallel")
    report.layout = _layout(parallel) if isinstance(parallel, dict) else None


def _inspect_arguments(report: Report, checkpoint: TorchDist, arch: Architecture | None) -> None:
    common, arguments = checkpoint.common(), arguments_of(checkpoint)
    if isinstance(common.get("iteration"), int):
        report.step = common["iteration"]
    if "checkpoint_version" in common:
        report.versions["checkpoint"] = str(common["checkpoint_version"])
    report.layout = _layout({name: arguments.get(key) for name, key in LAYOUT.items()})
    if arch is not None:
        check_arguments(arguments, arch, f"{checkpoint.folder}: args")


def _layout(degrees: Mapping[str, Any]) -> str | None:
    return " x ".join(f"{name.replace('_', ' ')} {degrees[name]}" for name in LAYOUT if degrees.get(name)) or None


def _count(report: Report, tensors: Iterable[tuple[Shape, torch.dtype]]) -> None:
    found = list(tensors)
    report.parameters = sum(prod(shape) for shape, _ in found)
    report.bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in found)
    report.dtype = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in found}))


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
