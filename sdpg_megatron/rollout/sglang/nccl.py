"""Check that servers and trainer have the same NCCL: no group connects two versions of it.

A server does not tell its version. That of a server's interpreter is asked for before it starts; of servers that are
attached to, the first broadcast tells.
Source of the rule: bootstrap.cc and init.cc of NCCL 2.28, "Mismatched NCCL version detected".
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

import torch

from sdpg_megatron.errors import ConfigError

SECONDS = 120.0
"""Bound of the call, which imports torch."""
CODE = "import json, torch; print(json.dumps(torch.cuda.nccl.version()))"


def own_version() -> str | None:
    """NCCL of this process's torch; None where that has none."""
    if not torch.cuda.is_available():
        return None
    return dotted(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]


def dotted(version: Sequence[int | str]) -> str:
    return ".".join(map(str, version))


def check_nccl(python: str, own: str) -> None:
    """Compare the trainer's NCCL with that of an interpreter for servers; nothing where that does not tell.

    Args:
        own: the trainer's version.

    Raises:
        ConfigError: they differ.
    """
    found = _version_of(python)
    if found is not None and found != own:
        raise ConfigError(
            "rollout.sglang.transport",
            "broadcast",
            f"one version of NCCL on both sides: the trainer's torch has {own}, that of {python} has {found}",
            "install the same torch in both, or use rollout.sglang.transport=shared (servers on this machine) or disk",
        )


def _version_of(python: str) -> str | None:
    try:
        done = subprocess.run([python, "-I", "-c", CODE], capture_output=True, encoding="utf-8", timeout=SECONDS)
        return dotted(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError, TypeError):
        return None  # a torch without CUDA, or a torch that cannot be imported: the server's start says more
