"""What a checkpoint's list of tensors may name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from sdpg_megatron.checkpoint.pickles import TENSOR_LIST, read_tensor_list
from sdpg_megatron.errors import CheckpointError


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def write(folder: Path, content: Any) -> None:
    (folder / TENSOR_LIST).write_bytes(pickle.dumps(content))


def test_descriptions_pass(tmp_path: Path) -> None:
    index = MetadataIndex("a", torch.Size([2]))
    described = Metadata(
        {"a": BytesStorageMetadata()}, {torch.bfloat16: torch.strided}, {index: _StorageInfo("f", 0, 9)}
    )
    write(tmp_path, described)
    assert read_tensor_list(tmp_path) == described


def test_members_of_enumerations_pass_by_value_or_by_name(tmp_path: Path) -> None:
    """Python 3.11.2 pickles them by getattr, 3.11.7 as calls."""
    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    for call in (Runs(getattr, _MEM_FORMAT_ENCODING, member.name), Runs(_MEM_FORMAT_ENCODING, member.value)):
        write(tmp_path, Metadata({"a": call}, storage_data={}))  # type: ignore[dict-item]
        assert read_tensor_list(tmp_path).state_dict_metadata == {"a": member}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Runs(os.mkdir, "made"), "posix.mkdir"),
        (Runs(eval, "1"), "builtins.eval"),
        (Runs(torch.load, "x"), "torch.serialization.load"),
        (Runs(getattr, TensorProperties, "__init__"), "builtins.getattr of .*"),
        (Runs(getattr, _MEM_FORMAT_ENCODING, "mro"), "builtins.getattr of .*"),
        (Runs(FileSystemWriter, "made"), "torch.distributed.checkpoint.filesystem.FileSystemWriter"),
    ],
)
def test_what_would_run_is_refused(tmp_path: Path, content: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, Metadata({"a": content}))
    with pytest.raises(CheckpointError, match=rf"\.metadata: found {name}, expected .*it would run code"):
        read_tensor_list(tmp_path)
    assert os.listdir(tmp_path) == [TENSOR_LIST]


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"hello", b"\x80\x04]\x94(K\x01"])
def test_what_is_no_pickle_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TENSOR_LIST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: found .*expected torch's list"):
        read_tensor_list(tmp_path)


def tensor(**changes: Any) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((2, 3)))
    fields = {"properties": TensorProperties(), "size": torch.Size((4, 3)), "chunks": [chunk], **changes}
    return TensorStorageMetadata(**fields)


@pytest.mark.parametrize(
    "listed",
    [
        Metadata({"a": tensor(size=("4", 3))}),
        Metadata({"a": tensor(size=None)}),
        Metadata({"a": tensor(size=torch.Size((4,)))}),
        Metadata({"a": tensor(properties=TensorProperties(dtype=3))}),
        Metadata({"a": tensor(chunks=[ChunkStorageMetadata((3, 0), (2, 3))])}),
        Metadata({"a": tensor(chunks=[ChunkStorageMetadata((-1, 0), (2, 3))])}),
        Metadata({"a": tensor(chunks=[7])}),
        Metadata({7: tensor()}),
        Metadata({}, storage_data={"a": _StorageInfo("f", 0, 1)}),
        Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo(3, 0, 1)}),
        Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo("f", -1, 1)}),
        Metadata({}, storage_data={MetadataIndex("a"): 3}),
        Metadata(3),
    ],
)
def test_a_list_of_another_form_is_named(tmp_path: Path, listed: Metadata) -> None:
    listed.storage_data = {} if listed.storage_data is None else listed.storage_data
    write(tmp_path, Metadata({"a": tensor()}, storage_data={MetadataIndex("a"): _StorageInfo("f", 0, 1)}))
    read_tensor_list(tmp_path)
    write(tmp_path, listed)
    with pytest.raises(CheckpointError, match=r"\.metadata: found .*expected torch's list"):
        read_tensor_list(tmp_path)
