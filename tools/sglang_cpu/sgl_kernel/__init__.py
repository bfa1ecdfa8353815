"""Stub of SGLang's compiled kernels for tests on machines without a GPU.

PyPI has `sgl_kernel` for CUDA only; its CPU version is compiled from source. SGLang imports names from it on CPUs, too,
but calls none of them with `--attention-backend torch_native --sampling-backend pytorch`, without AMX and for the model
families of the tests (Llama, Qwen2, Qwen3). Every name exists, and raises `NotImplementedError` if it is called.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel, which this CPU environment does not have")

    return absent
