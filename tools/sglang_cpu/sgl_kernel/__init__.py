"""Stands in for SGLang's compiled kernels on machines without a GPU, for tests.

The package index has `sgl_kernel` for CUDA only; its CPU edition is compiled from source. SGLang imports names from it
on CPUs too, but with `--attention-backend torch_native --sampling-backend pytorch`, without AMX and for the model
families that the tests use (Llama, Qwen2, Qwen3) it calls none of them. So each name exists, and says so if it is
called after all: nothing is computed here that a kernel should have computed.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel, and this environment is for CPUs without it")

    return absent
