"""Check that the servers' transformers, which is another than the trainer's, reads config.json as the trainer does."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import RolloutError, reason_of
from sdpg_megatron.rollout.sglang import read_config
from sdpg_megatron.rollout.transformers_check import differs, expected_settings

SECONDS = 300.0
"""Bound of the call, which imports transformers."""


def check_server_reading(python: str, folder: Path, arch: Architecture) -> None:
    """Run the servers' interpreter once, and compare the settings that its transformers gives SGLang.

    Args:
        python: interpreter that has sglang.
        arch: the folder's.

    Raises:
        ConfigError: a setting differs.
        RolloutError: the interpreter cannot read the file.
    """
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
    line = [python, "-I", read_config.__file__, str(folder.absolute()), *names]
    fix = "Fix: install a transformers there that reads it, or name another interpreter in rollout.sglang.python"
    try:
        done = subprocess.run(line, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS)
        if done.returncode == 0:
            said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return said
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"no answer in {SECONDS:g} s"
    except OSError as error:
        reason = reason_of(error)
    raise RolloutError(f"{python}: its transformers cannot read {folder / 'config.json'} ({reason}). {fix}")
