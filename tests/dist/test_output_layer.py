"""Models whose logits are not the product of hidden states and output weight: refused, or computed as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.pool import RankPool
from tests.tiny import write_tiny_model

CAP = 30.0


def capped(logits: Tensor) -> Tensor:
    return CAP * torch.tanh(logits / CAP)


def capped_by_the_model(model: Any) -> None:
    class Capped(type(model)):  # type: ignore[misc]
        def _postprocess(self, *args: Any, **options: Any) -> Tensor:
            return capped(super()._postprocess(*args, **options))

    model.__class__ = Capped


def scaled_by_the_model(model: Any) -> None:
    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options) / 8

    model.__class__ = Scaled


def capped_by_the_output_layer(model: Any) -> None:
    class Capped(type(model.output_layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            logits, bias = super().forward(*args, **options)
            return capped(logits), bias

    model.output_layer.__class__ = Capped


def capped_by_a_hook(model: Any) -> None:
    model.output_layer.register_forward_hook(lambda _, __, out: (capped(out[0]), out[1]))


def capped_by_a_patch(model: Any) -> None:
    forward = model.output_layer.forward
    model.output_layer.forward = lambda *args, **options: (capped(forward(*args, **options)[0]), None)


def biased(model: Any) -> None:
    model.output_layer.bias = torch.nn.Parameter(torch.zeros(model.output_layer.weight.shape[0]))


def predicting_several_tokens(model: Any) -> None:
    model.config.mtp_num_layers = 1


def another_class(model: Any) -> None:
    """Changes nothing of the logits."""
    model.__class__ = type("Mine", (type(model),), {})
    model.output_layer.__class__ = type("Layer", (type(model.output_layer),), {})


def refusal(folder: Path, change: Callable[[Any], None], dtype: str) -> tuple[str, bool]:
    """What `last_hidden` says of a changed model, and whether the output layer is as it was afterwards."""
    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.errors import ConfigError
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.forward_step import last_hidden
    from sdpg_megatron.mcore.model import build_chunks, load_weights

    config = ParallelConfig()
    ranks = parallel.initialize(config, 0)
    arch = read_architecture(folder)
    model_config = ModelConfig.model_validate({"path": folder, "dtype": dtype, "spec": "local"})
    chunks = build_chunks(arch, model_config, config, ranks)
    load_weights(chunks, folder, arch, ranks)
    tokens = torch.randint(arch.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    change(chunks[0])
    try:
        with torch.no_grad():
            last_hidden(chunks[0], tokens)
            last_hidden(chunks[0], tokens)
    except ConfigError as error:
        return str(error), "forward" not in vars(chunks[0].output_layer)
    return "", "forward" not in vars(chunks[0].output_layer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama", tied=False, seed=2, layers=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (capped_by_the_model, "logits that it changes after its output layer"),
        (scaled_by_the_model, "logits that it changes after its output layer"),
        (capped_by_a_hook, "logits that it changes after its output layer"),
        (capped_by_the_output_layer, "an output layer with a custom forward"),
        (biased, "an output layer with a bias"),
        (predicting_several_tokens, "mtp_num_layers=1"),
    ],
)
def test_logits_that_the_head_does_not_compute_are_refused(
    folder: Path, ranks: RankPool, change: Callable[[Any], None], found: str, dtype: str
) -> None:
    ((said, restored),) = ranks.run(refusal, 1, folder, change, dtype)
    assert said.startswith("GPTModel: found ") and found in said and said.endswith("head.logits_terms")
    assert restored


def test_a_patched_output_layer_is_refused(folder: Path, ranks: RankPool) -> None:
    ((said, _),) = ranks.run(refusal, 1, folder, capped_by_a_patch, "float32")
    assert "an output layer with a custom forward (ColumnParallelLinear)" in said


def test_a_class_that_changes_no_logits_is_taken(folder: Path, ranks: RankPool) -> None:
    assert ranks.run(refusal, 1, folder, another_class, "float32") == [("", True)]


def scaled_states(folder: Path) -> tuple[bool, bool]:
    """Whether a model with Megatron's MuP scale on its logits hands over states that have the scaled logits."""
    from megatron.core.models.gpt import GPTModel

    from sdpg_megatron.architecture import read_architecture
    from sdpg_megatron.config import ModelConfig, ParallelConfig
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.mcore.forward_step import last_hidden
    from sdpg_megatron.mcore.model import build_chunks, load_weights, output_weight

    config = ParallelConfig()
    ranks = parallel.initialize(config, 0)
    arch = read_architecture(folder)
    (chunk,) = build_chunks(arch, ModelConfig(path=folder), config, ranks)
    load_weights([chunk], folder, arch, ranks)
    tokens = torch.randint(arch.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(17).expand(2, -1)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if not hasattr(GPTModel, "_scale_logits"):  # megatron-core before 0.17: do as later versions do
            post = GPTModel._postprocess

            def postprocess(self: Any, *args: Any, **options: Any) -> Tensor:
                return self._scale_logits(post(self, *args, **options))

            stack.enter_context(mock.patch.object(GPTModel, "_scale_logits", lambda self, x: x * 0.25, create=True))
            stack.enter_context(mock.patch.object(GPTModel, "_postprocess", postprocess))
        chunk.config.use_mup, chunk.config.mup_output_mult = True, 0.25
        hidden, logits = last_hidden(chunk, tokens), chunk(tokens, positions, None)
    return torch.allclose(hidden @ output_weight(chunk).T, logits, atol=1e-5), bool(logits.abs().max() > 0.1)


def test_the_mup_scale_is_applied(folder: Path, ranks: RankPool) -> None:
    assert ranks.run(scaled_states, 1, folder) == [(True, True)]
