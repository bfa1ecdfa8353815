"""Functions that torch.compile turns into kernels on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdpg_megatron.mcore.compat.device import has_compiled_kernels


class CompiledOnGpu:
    """A function that is compiled for GPU tensors if Triton is installed, and called directly otherwise.

    It is compiled once for all numbers of tokens, which differ between micro-batches.
    """

    def __init__(self, function: Callable[..., Tensor], token_inputs: int) -> None:
        """`token_inputs`: number of leading arguments that have tokens as dimension 0."""
        self.function = function
        self.token_inputs = token_inputs

    def __call__(self, *inputs: Any) -> Tensor:
        compile_it = inputs[0].is_cuda and has_compiled_kernels()
        return self.run_compiled(*inputs) if compile_it else self.function(*inputs)

    def run_compiled(self, *inputs: Any) -> Tensor:
        for tensor in inputs[: self.token_inputs]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.compiled(*inputs)

    @cached_property
    def compiled(self) -> Callable[..., Tensor]:
        return torch.compile(self.function)
