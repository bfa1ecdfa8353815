"""From a configuration to servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.rollout.sglang.build import Keys, ServedModel, make_processes


@pytest.mark.parametrize(
    ("changes", "trainer_ranks", "devices"),
    [
        ({}, None, [1, 3]),
        ({}, "4", [4, 6]),
        ({"data": 2, "sink": "disk"}, "1", [1, 5]),
        ({"colocated": True, "sink": "shared"}, "4", [0, 2]),
        ({"first_gpu": 6}, "4", [6, 8]),
    ],
)
def test_no_two_started_servers_share_a_device(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    trainer_ranks: str | None,
    devices: list[int],
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if trainer_ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", trainer_ranks)
    model = ServedModel(
        folder=tmp_path,
        tokenizer=None,
        stop_ids=(1,),
        dtype="bfloat16",
        device="cuda",
        prompt_tokens=8,
        response_tokens=8,
    )
    config = SGLangConfig(servers=2, tensor=2, **changes)
    processes = make_processes(config, model, Keys(None, None), run_dir=tmp_path, seed=0)
    assert [process.launch.base_gpu for process in processes] == devices
    assert len({process.launch.seed for process in processes}) == 2
    for process in processes:
        process.stop()  # it holds a port
