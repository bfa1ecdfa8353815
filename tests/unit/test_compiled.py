"""Functions compiled on a GPU: direct calls elsewhere, and few graphs."""

from __future__ import annotations

from unittest import mock

import torch

from sdpg_megatron.mcore import layers
from sdpg_megatron.mcore.compiled import CompiledOnGpu


def test_on_a_cpu_the_function_is_called_directly() -> None:
    hidden, weight = torch.randn(7, 1, 2, 16), torch.rand(16)
    with mock.patch.object(torch, "compile", side_effect=AssertionError("compiled")):
        found = layers.rms_norm_on_gpu(hidden, weight, 1e-6)
    assert torch.equal(found, layers.rms_norm(hidden, weight, 1e-6))


def test_layers_and_numbers_of_tokens_share_graphs() -> None:
    """One graph for queries and one for keys: torch.compile gives up after eight graphs."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    norm = CompiledOnGpu(layers.rms_norm, token_inputs=1)
    vars(norm)["compiled"] = torch.compile(layers.rms_norm, backend=backend)
    for tokens in (5, 300, 77):
        for weight in (torch.nn.Parameter(torch.rand(16)) for _ in range(12)):
            for heads in (8, 2):
                norm.run_compiled(torch.randn(tokens, 1, heads, 16), weight, 1e-6)
    assert len(graphs) == 2
