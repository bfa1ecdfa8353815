"""The engine on a real server: what every engine must do, and what only one with servers does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.errors import ConfigError, RolloutError, ServerError, WeightError
from sdpg_megatron.records import Prompt
from sdpg_megatron.rollout.base import RolloutEngine, Sampling, SharedEngine, WeightsWanted
from sdpg_megatron.rollout.hf import stop_ids
from sdpg_megatron.rollout.sglang.engine import ServedModel, SGLangEngine
from tests.rollout.contract import EngineContract, MakeEngine, assert_same, stream, versions
from tests.sglang.conftest import Running
from tests.tiny import write_tiny_model

Open = Callable[..., SGLangEngine]


@pytest.fixture(scope="session")
def served(model: Path) -> ServedModel:
    return ServedModel(
        folder=model,
        tokenizer=AutoTokenizer.from_pretrained(model),
        stop_ids=stop_ids(model),
        dtype="float32",
        device="cpu",
        prompt_tokens=200,
        response_tokens=200,
    )


@pytest.fixture(scope="session")
def open_engine(server: Running, served: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Makes engines that attach to the shared server; those that a test leaves open are closed at the end."""
    opened: list[SGLangEngine] = []

    def attach(*, model: ServedModel = served, publishes: bool = True, nonce: str = "engine", **changes: Any) -> Any:
        config = SGLangConfig(urls=(server.url,), start_timeout=60.0, health_timeout=10.0, sink="shared")
        config = config.model_copy(update=changes)
        run_dir = tmp_path_factory.mktemp("run")
        opened.append(SGLangEngine(config, model, run_dir=run_dir, nonce=nonce, publishes=publishes))
        return opened[-1]

    yield attach
    for engine in opened:
        engine.close()


@pytest.fixture(scope="session")
def reused(open_engine: Open) -> Callable[[], SGLangEngine]:
    """Gives one engine again and again, or a new one where a test closed it: to attach takes a second."""
    engines: list[SGLangEngine] = []

    def give() -> SGLangEngine:
        if not engines or engines[-1].closed:
            engines.append(open_engine())
        return engines[-1]

    return give


class TestSGLangEngine(EngineContract):
    unseeded = "SGLang seeds requests only in its deterministic mode, where all responses of a group are the same"

    @pytest.fixture
    def model_folder(self, model: Path) -> Path:
        return model

    @pytest.fixture
    def make_engine(self, open_engine: Open) -> MakeEngine:
        return open_engine

    @pytest.fixture
    def engine(self, reused: Callable[[], SGLangEngine], weights: dict[str, Tensor]) -> RolloutEngine:
        """The one engine, serving version 1."""
        engine = reused()
        engine.publish(1, stream(weights))
        return engine
