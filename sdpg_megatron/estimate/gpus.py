"""Vendor figures of the GPUs that a run can be planned for."""

from __future__ import annotations

from dataclasses import dataclass

from sdpg_megatron.errors import ConfigError, did_you_mean

GIB = 1 << 30
MACHINE = 8
"""Assumed GPUs per machine."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Theoretical rates of one device, in one direction."""

    name: str
    flops: float
    """Dense bfloat16 operations per second."""
    memory: int
    """Bytes, as in nvidia-smi."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to GPUs of its machine: NVLink, or PCIe."""
    network: float
    """Bytes per second to other machines: a GPU's share of a typical network."""


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
"""GPUs by name, ordered by memory and age; SXM boards if there are several kinds."""


def find_gpu(name: str) -> Gpu:
    """Look up a GPU by its case-insensitive name. Raises `ConfigError`."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    fix = did_you_mean(name.upper(), GPUS) or "choose one of these"
    raise ConfigError("--gpu", name, f"one of {', '.join(GPUS)}", fix)
