"""Run the Megatron-LM plugin's program on CPUs. Megatron-LM requires GPUs and kernels before it trains anything.

torchrun ... tests/host/megatron_lm_cpu.py <arguments>
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import torch._dynamo

from sdpg_megatron.mcore.compat import device


class _Stream:
    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...


def patch_megatron_lm() -> None:
    """Replace the checks and calls of Megatron-LM that need a GPU. What it computes stays."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # required with tensor parallelism
    torch._dynamo.config.disable = True  # its compiler would take the GPU of the replaced calls for a real one
    device.install()
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.current_stream = _current_stream
    cuda.get_device_properties = _properties
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = cuda.max_memory_reserved = _no_bytes
    from megatron.training import arguments, initialize, training

    initialize_megatron = initialize.initialize_megatron
    training_module: Any = training
    training_module.initialize_megatron = functools.partial(initialize_megatron, allow_no_cuda=True)
    arguments_module: Any = arguments
    arguments_module.get_device_arch_version = lambda: 8
    initialize_module: Any = initialize
    initialize_module._compile_dependencies = lambda *args: None
    if hasattr(initialize_module, "fused_kernels"):  # 0.16
        initialize_module.fused_kernels.load = lambda args: None


def _current_stream(device: object = None) -> _Stream:
    return _Stream()


def _properties(device: object = None) -> Any:
    return type("Properties", (), {"major": 8, "minor": 0, "total_memory": 1 << 34, "name": "none"})()


def _no_bytes(device: object = None) -> int:
    return 0


if __name__ == "__main__":
    patch_megatron_lm()
    from sdpg_megatron.plugins.megatron_lm.__main__ import main

    main()
    sys.stdout.flush()
