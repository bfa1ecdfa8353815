"""The command ``sdpg-megatron convert``."""

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
    """Bring a model into the other format: a Hugging Face folder becomes a Megatron checkpoint, all else a folder.

    Args:
        to: the format that the caller wants; None for whichever the source is not of.
        like: where config.json and tokenizer are, of a Megatron checkpoint that does not know.
        dtype: a key of `DTYPES`; None for the types as they are.
        shard_bytes: bound of one safetensors file.
        text: what both models are to read before the result is put in its place; None for nothing.

    Raises:
        SdpgError: nothing is left of the target then.
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
        expected = "nothing beside a Hugging Face folder, which has its own config.json and tokenizer"
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
    """What compares the logits of the source's model with those of the one that was written.

    Raises:
        ConversionError: the text cannot be read. What is returned raises it where the logits differ.
    """
    from sdpg_megatron.convert.verify import logit_difference, tokens_of

    if (hf_assets := like or source.hf_assets) is not None:
        tokens_of(hf_assets, text)

    def check(written: Path) -> None:
        is_folder = source.kind == "Hugging Face folder"
        folder, checkpoint = (source.folder, written) if is_folder else (written, source.folder)
        difference, scale = logit_difference(folder, checkpoint, text, dtype)
        console.print(f"largest difference of logits: {difference:.3g}, the logits up to {scale:.3g}", highlight=False)

    return check
