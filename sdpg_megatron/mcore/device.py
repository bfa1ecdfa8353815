"""Lets megatron-core run where no CUDA device exists, so that every distributed path can be tested on any machine.

megatron-core (0.16 to 0.19) names "cuda" in allocations, asks for CUDA RNG states and compares type names. On a machine
with a GPU nothing here does anything. Each patch can go when megatron-core takes its device from the model instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def training_device() -> torch.device:
    """The device that parameters and activations live on: this rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


@functools.cache  # idempotent: entering the mode twice would only cost time, but patches must not stack
def install() -> None:
    """Redirect megatron-core's CUDA requests to the CPU, for the whole process; nothing where a GPU is present."""
    if torch.cuda.is_available():
        return
    mode: Any = _CudaMeansCpu()
    mode.__enter__()  # and never left: megatron-core may be called from anywhere
    _redirect_cuda_module()
    _redirect_rng_tracker()


class _CudaMeansCpu(TorchFunctionMode):
    """Turns every "cuda" device argument into the CPU; type names keep saying "torch.cuda".

    The distributed optimizer sorts parameters by `param.type() == "torch.cuda.FloatTensor"` and its kin.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(arg) for arg in args)
        if kwargs and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        return func(*args, **(kwargs or {}))


def _on_cpu(argument: Any) -> Any:
    is_cuda = (isinstance(argument, torch.device) and argument.type == "cuda") or (
        isinstance(argument, str) and argument.startswith("cuda")
    )
    return CPU if is_cuda else argument


def _redirect_cuda_module() -> None:
    """`torch.cuda` functions that megatron-core calls without asking whether a device exists."""

    def nothing(*_: object, **__: object) -> None: ...

    cuda: Any = torch.cuda  # these are plain functions of the module: replaced, not subclassed
    cuda.current_device = lambda: CPU
    cuda.synchronize = nothing
    cuda.current_stream = nothing  # 0.19 asks for it before each gradient reduction, and uses it with CUDA graphs alone
    cuda.empty_cache = nothing
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _redirect_rng_tracker() -> None:
    """The tracker behind dropout and recompute keeps CPU generator states instead."""
    from megatron.core.tensor_parallel import random as tracker

    tracker._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
