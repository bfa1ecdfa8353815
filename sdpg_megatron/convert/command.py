"""Implementation of ``sdpg-megatron convert``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from sdpg_megatron.convert.convert import to_hugging_face, to_megatron
from sdpg_megatron.convert.source import Source, find_source
from sdpg_megatron.errors import ConversionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def convert(
    path: Path,
    target: Path,
    *,
    to: Literal["megatron", "huggingface"] | None = None,
    like: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    text: str | None = None,
    console: Console | None = None,
) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint, or a Megatron checkpoint or run to a Hugging Face folder.

    Args:
        to: required target format; None for the one that the source does not have.
        like: folder with config.json and tokenizer, for a Megatron checkpoint without them.
        dtype: a key of `DTYPES`; None keeps the dtypes.
        shard_bytes: largest safetensors file.
        text: compare both models' logits of this text before the result is renamed; None for no comparison.

    Raises:
        SdpgError: nothing remains at `target`.
    """
    console = console or Console(stderr=True)
    source = find_source(path)
    is_folder = source.kind == "Hugging Face folder"
    if to is not None and (to == "megatron") != is_folder:
        wanted = "a Hugging Face folder" if to == "megatron" else "a Megatron checkpoint, or a run"
        raise ConversionError(str(path), f"a {source.kind}", wanted, "convert the other way")
    if shard_bytes < 1:
        raise ConversionError("shard_bytes", shard_bytes, "at least 1", "choose a larger bound")
    if is_folder and like is not None:
        expected = "no --like for a Hugging Face folder, which has config.json and tokenizer"
        raise ConversionError("--like", str(like), expected, "leave it out")
    to_type = DTYPES[dtype] if dtype else None
    check = _check_logits(source, like, text, to_type, console) if text is not None else None
    if is_folder:
        to_megatron(path, target, dtype=to_type, check=check, console=console)
    else:
        to_hugging_face(source, target, like=like, dtype=to_type, shard_bytes=shard_bytes, check=check, console=console)


def _check_logits(
    source: Source, like: Path | None, text: str, dtype: torch.dtype | None, console: Console
) -> Callable[[Path], None]:
    """Make the check that compares the logits of the source's and of the written model.

    Raises:
        ConversionError: the text cannot be tokenized. The check raises it if the logits differ.
    """
    from sdpg_megatron.convert.verify import logit_difference, tokens_of

    if (hf_assets := like or source.hf_assets) is not None:
        tokens_of(hf_assets, text)

    def check(written: Path) -> None:
        is_folder = source.kind == "Hugging Face folder"
        folder, checkpoint = (source.folder, written) if is_folder else (written, source.folder)
        difference, scale = logit_difference(folder, checkpoint, text, dtype)
        console.print(f"largest difference of logits: {difference:.3g}; largest logit: {scale:.3g}", highlight=False)

    return check
