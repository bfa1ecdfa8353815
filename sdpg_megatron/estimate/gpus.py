"""GPUs that a run can be planned for: their makers' figures."""

from __future__ import annotations

from dataclasses import dataclass

from sdpg_megatron.errors import ConfigError, did_you_mean

GIB = 1 << 30
MACHINE = 8
"""Assumed GPUs of a machine."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates are of one device, in one direction, at their theoretical best."""

    name: str
    flops: float
    """Dense bfloat16 operations a second."""
    memory: int
    """Bytes, as nvidia-smi shows them."""
    bandwidth: float
    """Bytes a second from its memory."""
    link: float
    """Bytes a second to the others of its machine: NVLink, or PCIe."""
    network: float
    """Bytes a second to other machines: its share of what such machines usually have."""


def _gpu(name: str, teraflops: float, mib: int, terabytes: float, link: float, network: float) -> Gpu:
    return Gpu(name, teraflops * 1e12, mib << 20, terabytes * 1e12, link * 1e9, network * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40", 312, 40960, 1.555, 300, 25),
        _gpu("A100", 312, 81920, 2.039, 300, 25),
        _gpu("L40S", 362, 46068, 0.864, 32, 25),
        _gpu("H20", 148, 97871, 4.0, 450, 50),
        _gpu("H100", 989, 81559, 3.35, 450, 50),
        _gpu("H200", 989, 143771, 4.8, 450, 50),
        _gpu("B200", 2250, 183359, 8.0, 900, 50),
    )
}
"""By name, in the order of their memory and age. SXM boards where there are several."""


def find_gpu(name: str) -> Gpu:
    """Look up a GPU by its name in any case. Raises `ConfigError`."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    fix = did_you_mean(name.upper(), GPUS) or "choose one of these"
    raise ConfigError("--gpu", name, f"one of {', '.join(GPUS)}", fix)
