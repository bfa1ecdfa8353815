"""Run megatron-core without a CUDA device, so that every distributed path can be tested on any machine.

megatron-core (0.16 to 0.19) allocates on "cuda", reads CUDA RNG states and compares type names. On a machine with a GPU
only `_define_te_gemm` has an effect. Each patch can be removed when megatron-core takes the device from the model.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdpg_megatron.config import ModelConfig
from sdpg_megatron.errors import ConfigError

CPU = torch.device("cpu")


def training_device() -> torch.device:
    """Device of parameters and activations: this rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def has_te() -> bool:
    """True if Transformer Engine is installed and a GPU is available."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def has_compiled_kernels() -> bool:
    """True if a GPU is available and Triton is installed, which torch.compile needs."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def check_layers(model: ModelConfig) -> None:
    """Raise `ConfigError` if the configuration needs Transformer Engine and it is not available."""
    if model.spec == "te" and not has_te():
        gpu = "no Transformer Engine" if torch.cuda.is_available() else "no GPU"
        fix = "pip install 'transformer-engine[pytorch]' on a machine with a GPU, or set model.spec to auto or local"
        raise ConfigError("model.spec", f"te, and {gpu}", "Transformer Engine and a GPU for it", fix)


@functools.cache  # patches must not stack
def install() -> None:
    """Redirect megatron-core's CUDA requests to the CPU in this process, unless a GPU is present. Idempotent."""
    _define_te_gemm()
    if torch.cuda.is_available():
        return
    mode: Any = _CudaMeansCpu()
    mode.__enter__()  # never exited: megatron-core may be called from anywhere
    _redirect_cuda_module()
    _redirect_rng_tracker()
    _redirect_experts()
    _redirect_uneven_collectives()


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces every "cuda" device argument by the CPU. Type names still begin with "torch.cuda".

    The distributed optimizer sorts parameters by type names such as "torch.cuda.FloatTensor".
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
    """Replace `torch.cuda` functions that megatron-core calls without checking for a device."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    # Each replacement is a separate object: torch.compile refuses to register one object under two of these names.
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = _NoStream  # 0.19 calls it before each gradient reduction; only CUDA graphs use the result
    cuda.empty_cache = lambda: None
    cuda.Stream = _NoStream
    cuda.stream = contextlib.nullcontext
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


class _NoStream:
    """Replaces CUDA streams and events. On the CPU all work is complete when a call returns."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None: ...


def _redirect_experts() -> None:
    """Patch the token dispatcher of a mixture of experts."""
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host  # the original does not convert CPU tensors to numpy


def _define_te_gemm() -> None:
    """Define `te_general_gemm` for the router, with or without a GPU.

    megatron-core 0.16 reads the name in every router pass, but defines it only with Transformer Engine.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _redirect_uneven_collectives() -> None:
    """Emulate gathers and scatters of uneven shards, which Gloo lacks. Ranks that shard an expert use them."""
    from megatron.core.tensor_parallel import mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(shard: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            whole: Tensor = even_gather(shard, group, None, use_global_buffer)
            return whole
        longest = max(output_split_sizes)
        padded = torch.cat([shard, shard.new_zeros(longest - len(shard), *shard.shape[1:])])
        shares = torch.split(even_gather(padded, group), longest)
        return torch.cat([share[:length] for share, length in zip(shares, output_split_sizes, strict=True)])

    def scatter(whole: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        shard: Tensor
        if input_split_sizes is None or group.size() == 1:
            shard = even_scatter(whole, group, None, use_global_buffer)
        else:
            total = whole.clone()
            torch.distributed.all_reduce(total, group=group)
            shard = torch.split(total, list(input_split_sizes))[group.rank()].contiguous()
        return shard

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter


def _redirect_rng_tracker() -> None:
    """Make the RNG tracker of dropout and recomputation use CPU generator states."""
    from megatron.core.tensor_parallel import random as tracker

    tracker._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
