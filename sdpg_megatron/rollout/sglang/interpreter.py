"""Checks of the servers' Python interpreter, made by running it: sglang, transformers and NCCL."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import ConfigError, RolloutError, reason_of
from sdpg_megatron.rollout.sglang import read_config

PYTHON_VARIABLE = "SDPG_SGLANG_PYTHON"
RECORDS_SECONDS, TORCH_SECONDS, TRANSFORMERS_SECONDS = 60.0, 120.0, 300.0
"""Time limits of a call that reads package records, imports torch, or imports transformers."""


def default_python() -> str:
    """``$SDPG_SGLANG_PYTHON``, or this process's interpreter."""
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


def _run(line: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds)


def _last_error(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def check_interpreter(python: str) -> None:
    """Check that an interpreter runs and has sglang, from its package records: an import would take seconds. Raises
    `RolloutError`."""
    fix = (
        "Fix: install sglang there, or name an interpreter that has it in rollout.sglang.python or "
        f"${PYTHON_VARIABLE}. scripts/install_sglang_cpu.sh makes one for machines without a GPU"
    )
    try:
        done = _run([python, "-I", "-c", "import importlib.metadata as m; m.version('sglang')"], RECORDS_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RolloutError(
            f"{python}: the interpreter for SGLang servers does not run ({reason_of(error)}). {fix}"
        ) from error
    if done.returncode != 0:
        raise RolloutError(f"{python}: the interpreter for SGLang servers has no sglang ({_last_error(done)}). {fix}")


# --- transformers


def check_server_reading(python: str, folder: Path, arch: Architecture) -> None:
    """Check that an interpreter's transformers gives SGLang the settings that the trainer reads from config.json.

    Raises:
        ConfigError: a setting differs.
        RolloutError: the interpreter cannot read the file.
    """
    from sdpg_megatron.rollout.transformers_check import differs, expected_settings  # imports transformers

    expected: dict[str, Any] = {
        **expected_settings(arch),
        "rotary base": arch.rope_theta,
        "rotary scaling factor": arch.rope_scaling,
    }
    said = _read(python, folder, expected)
    for key, value in expected.items():
        found = said["settings"].get(key, value)
        close = isinstance(found, float | int) and isinstance(value, float) and math.isclose(found, value, rel_tol=1e-6)
        if found != value and not close:
            raise differs(folder, key, found, value, f"{said['version']} of {python}")


def _read(python: str, folder: Path, names: dict[str, Any]) -> dict[str, Any]:
    fix = "Fix: install a transformers there that reads it, or name another interpreter in rollout.sglang.python"
    try:
        done = _run([python, "-I", read_config.__file__, str(folder.absolute()), *names], TRANSFORMERS_SECONDS)
        if done.returncode == 0:
            said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return said
        reason = _last_error(done)
    except subprocess.TimeoutExpired:
        reason = f"no answer in {TRANSFORMERS_SECONDS:g} s"
    except OSError as error:
        reason = reason_of(error)
    raise RolloutError(f"{python}: its transformers cannot read {folder / 'config.json'} ({reason}). {fix}")


# --- NCCL


def own_version() -> str | None:
    """NCCL version of this process's torch; None without NCCL."""
    if not torch.cuda.is_available():
        return None
    return _dotted(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]


def check_nccl(python: str, own: str) -> None:
    """Check that an interpreter has the trainer's NCCL version `own`: a group needs one version on all ranks.

    An interpreter that does not tell its version passes. For servers at `rollout.sglang.urls` the first broadcast
    shows a difference.
    Source of the rule: bootstrap.cc and init.cc of NCCL 2.28, "Mismatched NCCL version detected".

    Raises:
        ConfigError: the versions differ.
    """
    code = "import json, torch; print(json.dumps(torch.cuda.nccl.version()))"
    try:
        found = _dotted(json.loads(_run([python, "-I", "-c", code], TORCH_SECONDS).stdout.splitlines()[-1]))
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError, TypeError):
        return  # torch without CUDA, or one that cannot be imported: the server's start shows it
    if found != own:
        raise ConfigError(
            "rollout.sglang.transport",
            "broadcast",
            f"one version of NCCL on both sides: the trainer's torch has {own}, that of {python} has {found}",
            "install the same torch in both, or use rollout.sglang.transport=shared (servers on this machine) or disk",
        )


def _dotted(version: Sequence[int | str]) -> str:
    return ".".join(map(str, version))
