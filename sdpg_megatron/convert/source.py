"""Detection of a path's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdpg_megatron.checkpoint.state import CHECKPOINT_FOLDER, MANIFEST, RunState, checkpoint_folders
from sdpg_megatron.convert.torch_dist import BACKEND_FILE
from sdpg_megatron.errors import ConversionError, fix_of
from sdpg_megatron.hf_files import fix_for_missing

TRACKER_FILE = "latest_checkpointed_iteration.txt"
"""Megatron-LM's tracker: the newest iteration, or "release" for a model without training state."""
RELEASE = "release"
HF_ASSETS_FOLDER = "huggingface"
"""Folder in a converted Megatron checkpoint with the Hugging Face folder's files except the weights."""

Kind = Literal["Hugging Face folder", "run checkpoint", "Megatron checkpoint"]


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk."""

    kind: Kind
    folder: Path
    """Folder with the tensors."""
    hf_assets: Path | None
    """Hugging Face folder with config.json and tokenizer; None if unknown."""
    state: RunState | None = None
    """A run checkpoint's manifest."""


def find_source(path: Path) -> Source:
    """Find the model at a path: a run's newest checkpoint, or the iteration in Megatron's tracker file.

    Raises:
        ConversionError: there is none.
        CheckpointError: a run checkpoint's manifest is missing or damaged; an older one is not used instead.
    """
    if (path / "config.json").is_file():
        return Source("Hugging Face folder", path, path)
    if (path / MANIFEST).is_file() or path in checkpoint_folders(path.parent):
        state = RunState.read(path / MANIFEST)
        return Source("run checkpoint", path, _started_from(state.config), state)
    if (path / BACKEND_FILE).is_file():
        return Source("Megatron checkpoint", path, _beside(path.parent))
    if (path / TRACKER_FILE).is_file():
        return Source("Megatron checkpoint", _iteration(path), _beside(path))
    for folder in (path / CHECKPOINT_FOLDER, path):
        if found := checkpoint_folders(folder):
            return find_source(found[-1])
    raise ConversionError(
        str(path),
        "no known format" if path.exists() else "no such path",
        f"a Hugging Face folder (config.json), a run's folder or checkpoint ({MANIFEST}), or a Megatron checkpoint "
        f"({TRACKER_FILE} or {BACKEND_FILE})",
        fix_for_missing(path),
    )


def _iteration(path: Path) -> Path:
    try:
        text = (path / TRACKER_FILE).read_text(encoding="utf-8").strip()
    except OSError as error:
        fix = fix_of(error, path / TRACKER_FILE, reading=True)
        raise ConversionError(str(path / TRACKER_FILE), error.strerror, "a readable file", fix) from error
    except ValueError as error:
        fix = "name an iteration's folder itself, or write its number there"
        raise ConversionError(str(path / TRACKER_FILE), str(error), "text in UTF-8", fix) from error
    if text != RELEASE and not (text.isascii() and text.isdigit()):
        raise ConversionError(str(path / TRACKER_FILE), repr(text), f"a number or {RELEASE!r}", "write one of them")
    folder = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ConversionError(
            str(path / TRACKER_FILE), text, f"the iteration of a folder here, such as {folder.name}", "write its number"
        )
    return folder


def _beside(path: Path) -> Path | None:
    folder = path / HF_ASSETS_FOLDER
    return folder if (folder / "config.json").is_file() else None


def _started_from(config: Mapping[str, Any]) -> Path | None:
    """Hugging Face folder of the model that a run started from, if it still exists."""
    model = config.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    return Path(path) if isinstance(path, str) and (Path(path) / "config.json").is_file() else None
