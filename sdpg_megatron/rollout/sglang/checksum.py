"""What a server's checksums must be, computed from a weight stream, and how they compare with what it answers.

A server holds its weights under its own names, some of them joined, and cut over its tensor-parallel ranks.
Here the same is done to the trainer's, one parameter at a time, and each rank's share is hashed as the server does it.

Source of what is hashed, and how: sglang.srt.utils.weight_checker of SGLang 0.5.23.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import RolloutError, WeightError
from sdpg_megatron.rollout.sglang.client import Client, RankChecksums
from sdpg_megatron.rollout.sglang.server_layout import ServerLayout, check_layout, server_parameter, share
from sdpg_megatron.weights import Bucket, hf_shapes

LISTED = 8
"""Tensors that one error names, for each server."""
CUDA_HASHES = Path("kernels", "ops", "memory", "gpu_tensor_hash.py"), Path("srt", "layers", "multimodal.py")
"""Files of the package sglang with its hash of CUDA tensors: that of 0.5.23, that of 0.5.15."""

Hash = Callable[[Tensor], str]


# --- hashes


def sha256_hash(tensor: Tensor) -> str:
    """What SGLang makes of a tensor that is not on CUDA: the first 8 bytes of the SHA-256 of its bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()[:16]


def hash_on(device: str) -> Hash:
    """The hash of servers on `device`.

    Raises:
        RolloutError: it is SGLang's own kernel, and SGLang is not installed here.
    """
    if device != "cuda":
        return sha256_hash
    # The file alone: importing the package would patch transformers for the whole trainer.
    package = importlib.util.find_spec("sglang")
    folder = Path(package.origin).parent if package and package.origin else None
    path = next((folder / place for place in CUDA_HASHES if (folder / place).is_file()), None) if folder else None
    spec = importlib.util.spec_from_file_location("sglang_gpu_tensor_hash", path) if path else None
    if spec is None or spec.loader is None:
        raise RolloutError(
            "weights of servers on CUDA are compared with SGLang's own hash, which is not in the trainer's "
            "environment. Fix: pip install --no-deps sglang==<the servers' version> there, or set "
            "rollout.sglang.verify_every to 0"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda tensor: f"{module.gpu_tensor_hash(tensor.detach().cuda()):016x}"


# --- expected and found


class ExpectedChecksums:
    """Takes a weight stream and gives what the ranks of a server must answer once they hold these weights.

    It keeps the parts of a joined parameter until all are there: with a stream in canonical order, of one at a time.
    """

    def __init__(self, arch: Architecture, layout: ServerLayout, hash_tensor: Hash | None = None) -> None:
        """
        Args:
            hash_tensor: None for that of the server's device.

        Raises:
            RolloutError: see `check_layout` and `hash_on`.
        """
        check_layout(arch, layout)
        self._arch = arch
        self._hash = hash_tensor or hash_on(layout.device)
        self._missing = hf_shapes(arch)
        self._waiting: dict[str, Tensor] = {}
        self._ranks: list[dict[str, str]] = [{} for _ in range(layout.tensor)]

    def add(self, bucket: Bucket) -> None:
        """Take whole Hugging Face tensors, of the type that the server holds.

        Raises:
            WeightError: one of them is not the model's, came before, or has another shape.
        """
        for name, tensor in bucket:
            expected, found = self._missing.pop(name, None), tuple(tensor.shape)
            if found != expected:
                raise WeightError(f"weight stream: tensor {name!r} of shape {found}, expected {expected or 'none'}")
            joined, parts = server_parameter(name)
            self._waiting[name] = tensor
            if all(part in self._waiting for part in parts):
                self._finish(joined, {part: self._waiting.pop(part) for part in parts})

    def _finish(self, joined: str, parts: Mapping[str, Tensor]) -> None:
        size = len(self._ranks)
        for rank, checksums in enumerate(self._ranks):
            shares = [share(name, tensor, self._arch, rank, size) for name, tensor in parts.items()]
            checksums[joined] = self._hash(torch.cat(shares) if len(shares) > 1 else shares[0])

    def finish(self) -> list[dict[str, str]]:
        """Checksums by the server's names, for each tensor-parallel rank.

        Raises:
            WeightError: tensors are missing from the stream.
        """
        if self._missing:
            raise WeightError(f"weight stream: it ended without {_listed(self._missing)}")
        return self._ranks


@dataclass(frozen=True, slots=True)
class Served:
    """What one server said of its weights."""

    url: str
    layout: ServerLayout
    ranks: Sequence[RankChecksums]
    """Of every rank, data-parallel replicas one after the other."""


async def ask(client: Client) -> Served:
    """Raises `ServerError` where the server does not tell, and `RolloutError` as `Layout.read` does."""
    layout = ServerLayout.read(client.url, await client.server_info())
    return Served(client.url, layout, await client.checksums())


@dataclass(frozen=True, slots=True)
class Comparison:
    """A server's weights beside the trainer's, by the server's names."""

    url: str
    equal: int
    """Parameters that are the trainer's, on all ranks."""
    different: Mapping[str, Sequence[int]]
    """Those that are not, with the tensor-parallel ranks where."""
    absent: tuple[str, ...]
    """Parameters of the trainer's model that a rank does not list."""
    not_compared: tuple[str, ...]
    """Parameters that the trainer's model does not have, for example a draft model's."""

    @property
    def fault(self) -> str | None:
        """What is wrong, and what to do; None where all of the trainer's parameters are equal."""
        faults = []
        if self.absent:
            faults.append(f"it has no {_listed(self.absent)}. Fix: start it with the run's model.path")
        if self.different:
            ranks = sorted({rank for where in self.different.values() for rank in where})
            faults.append(
                f"{len(self.different)} of {self.equal + len(self.different)} weights are not the trainer's, on "
                f"tensor-parallel ranks {ranks}: {_listed(self.different)}. Fix: publish again, in the server's dtype; "
                "where it persists, choose another rollout.sglang.transport"
            )
        return "; ".join(faults) or None

    def __str__(self) -> str:
        rest = f"; {len(self.not_compared)} not compared: {_listed(self.not_compared)}" if self.not_compared else ""
        return f"{self.url}: {self.fault or f'{self.equal} weights equal'}{rest}"


def compare(expected: Sequence[Mapping[str, str]], served: Served) -> Comparison:
    """Compare every rank of a server, in each of its data-parallel replicas.

    Args:
        expected: of `ExpectedChecksums.finish`, for the server's layout.

    Raises:
        RolloutError: ranks did not answer.
    """
    answered, layout = sorted(rank.tensor_rank for rank in served.ranks), served.layout
    if answered != sorted([*range(layout.tensor)] * layout.data):
        raise RolloutError(
            f"{served.url}: checksums of tensor-parallel ranks {answered}, expected {layout.data} of each of "
            f"{layout.tensor}"
        )
    different: dict[str, set[int]] = {}
    absent: dict[str, None] = {}
    not_compared: dict[str, None] = {}
    for rank in served.ranks:
        wanted = expected[rank.tensor_rank]
        absent |= dict.fromkeys(wanted.keys() - rank.by_name.keys())
        not_compared |= dict.fromkeys(rank.by_name.keys() - wanted.keys())
        for name in wanted.keys() & rank.by_name.keys():
            if rank.by_name[name] != wanted[name]:
                different.setdefault(name, set()).add(rank.tensor_rank)
    return Comparison(
        url=served.url,
        equal=len(expected[0].keys() - absent.keys() - different.keys()),
        different={name: sorted(different[name]) for name in expected[0] if name in different},
        absent=tuple(name for name in expected[0] if name in absent),
        not_compared=tuple(sorted(not_compared)),
    )


def verify(arch: Architecture, servers: Sequence[Served], buckets: Iterable[Bucket]) -> list[Comparison]:
    """Compare servers with a weight stream, which is read once and always to its end: its source is collective.

    On CPUs with AMX, SGLang packs 16-bit weights, and they differ from the trainer's; compare in float32 there.

    Args:
        arch: the model.
        servers: what they answered; none of them may take weights meanwhile.
        buckets: the trainer's weights, in the type that the servers hold.

    Raises:
        WeightError: a server's weights are not the stream's; names all such servers, and tensors of each.
        RolloutError: they cannot be compared.
    """
    stream = iter(buckets)
    try:
        expected = {served.layout: ExpectedChecksums(arch, served.layout) for served in servers}
        for bucket in stream:
            for checksums in expected.values():
                checksums.add(bucket)
            del bucket  # It would be held while the next one is made.
        comparisons = [compare(expected[served.layout].finish(), served) for served in servers]
    except Exception:
        deque(stream, maxlen=0)
        raise
    if faulty := [comparison for comparison in comparisons if comparison.fault]:
        raise WeightError("\n".join(map(str, faulty)))
    return comparisons


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(map(repr, every[:LISTED])) + more
