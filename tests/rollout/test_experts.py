"""The embedded engine's record of experts: what transformers chooses when it reads prompt and response at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdpg_megatron.records import Prompt
from sdpg_megatron.rollout.base import Sampling, compact
from tests.rollout.contract import stream
from tests.rollout.test_hf import build
from tests.tiny import EXPERTS_PER_TOKEN, Family, write_tiny_model

LAYERS = 3


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("lengths", [(7, 3, 5), (1, 1)], ids=["padded", "no_prefill"])
def test_the_record_is_what_the_routers_choose(tmp_path: Path, family: Family, lengths: tuple[int, ...]) -> None:
    folder = write_tiny_model(tmp_path / family, family, tied=False, seed=7, layers=LAYERS)
    engine = build(folder, batch_size=4)
    engine.publish(1, stream(load_file(folder / "model.safetensors")))
    drawn = torch.Generator().manual_seed(3)
    prompts = [Prompt(f"p{n}", tuple(torch.randint(5, 300, (n,), generator=drawn).tolist()), (), "") for n in lengths]
    groups = engine.generate(prompts, Sampling(n=3, max_tokens=6, seed=2, experts=True))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for group in groups:
        for completion in group.completions:
            tokens = [*group.prompt.student_tokens, *completion.tokens]
            logits = model(torch.tensor([tokens[:-1]]), output_router_logits=True).router_logits
            expected_TLK = torch.stack([layer.topk(EXPERTS_PER_TOKEN).indices for layer in logits], dim=1)
            assert completion.experts is not None and completion.experts.dtype == np.uint8
            assert completion.experts.tolist() == expected_TLK.tolist()
    assert engine.generate(prompts, Sampling(n=3, max_tokens=6, seed=2)) == groups
    (plain, *_) = engine.generate(prompts, Sampling(n=3, max_tokens=6, seed=2))
    assert all(completion.experts is None for completion in plain.completions)


def test_numbers_are_kept_as_narrow_as_they_are() -> None:
    assert compact(np.array([[[0, 255]]], dtype=np.int32)).dtype == np.uint8
    assert compact(np.array([[[0, 256]]], dtype=np.int32)).tolist() == [[[0, 256]]]
    assert compact(np.array([[[0, 256]]], dtype=np.int32)).dtype == np.int16
