"""Read and check the files of a Hugging Face folder. Incomplete downloads are errors with a fix."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from sdpg_megatron.errors import ConfigError, fix_of

HF_ASSETS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Tokenizer and generation files of a Hugging Face folder, in addition to config.json and the weights."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOAD_AGAIN = "download the model again: hf download OWNER/NAME --local-dir FOLDER"


def check_files(folder: Path) -> None:
    """Check that configuration, tokenizer and weight files have content, and that JSON files are valid.

    Weights are not read.

    Raises:
        ConfigError: no config.json; or a file that is empty, a broken link, a Git LFS pointer or invalid JSON.
    """
    read_config(folder)
    for path in sorted(folder.iterdir()):
        known = path.name in HF_ASSETS or path.name.endswith((".safetensors", ".safetensors.index.json"))
        if known and path.suffix == ".json":
            read_json(path)
        elif known:
            check_file(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model.

    Raises:
        ConfigError: as `check_file` and `read_json`; or there is no such folder or file.
    """
    path = folder / "config.json"
    if path.exists() or path.is_symlink():
        return read_json(path)
    fix = fix_for_missing(folder)
    raise ConfigError("model.path", str(path), "a Hugging Face folder with a config.json, on this machine", fix)


def fix_for_missing(path: Path) -> str:
    """Fix for a folder that is missing or incomplete.

    It proposes a download if the path looks like a hub id and no folder with the owner's name exists.
    """
    if path.is_file():
        return f"name its folder, {path.parent}" if path.parent.name else "name a folder"
    if path.exists():
        return "check the path, or complete the folder"
    if _HUB_ID.fullmatch(str(path)) and not path.parent.exists():
        return f"a folder is needed, download it: hf download {path} --local-dir {path.name}, and name {path.name}"
    return fix_of(FileNotFoundError(errno.ENOENT, ""), path, reading=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: as `check_file`; or the file is not JSON, or not an object.
    """
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = fix_of(error, path, reading=True)
        raise ConfigError("model.path", f"{path}: {error.strerror}", "a readable file", fix) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("model.path", f"{path}: {error}", "valid JSON", _DOWNLOAD_AGAIN) from error
    if not isinstance(content, dict):
        raise ConfigError("model.path", f"{path}: a {type(content).__name__}", "a JSON object", "check the file")
    return content


def check_file(path: Path) -> None:
    """Check that a path is a file with content.

    Raises:
        ConfigError: a broken link, no file, an empty file, or a Git LFS pointer.
    """
    if path.is_symlink() and not path.exists():
        found, fix = f"{path}: a link to {os.readlink(path)}, which does not exist", _DOWNLOAD_AGAIN
    elif not path.is_file():
        found, fix = f"{path}: no file", _DOWNLOAD_AGAIN
    else:
        try:
            with path.open("rb") as file:
                head = file.read(len(_LFS_POINTER))
        except OSError as error:
            fix = fix_of(error, path, reading=True)
            raise ConfigError("model.path", f"{path}: {error.strerror}", "a readable file", fix) from error
        if head and head != _LFS_POINTER:
            return
        found, fix = f"{path}: an empty file", _DOWNLOAD_AGAIN
        if head:
            found, fix = f"{path}: a Git LFS pointer", f"git lfs pull in {path.parent}, or {_DOWNLOAD_AGAIN}"
    raise ConfigError("model.path", found, "a file with content", fix)
