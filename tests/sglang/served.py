"""What engines are told of the tiny model that the servers serve."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from sdpg_megatron.data.tokenizer import stop_ids
from sdpg_megatron.rollout.sglang.engine import ServedModel
from tests.tiny import VOCAB


def served_model(folder: Path, *, prompt_tokens: int, response_tokens: int) -> ServedModel:
    """The model of a folder, in float32 on the CPU."""
    return ServedModel(
        folder=folder,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        stop_ids=stop_ids(folder, VOCAB),
        dtype="float32",
        device="cpu",
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
    )
