"""An interpreter that passes for one with sglang: this one, with an answer for the version of sglang."""

from __future__ import annotations

import sys
from pathlib import Path


def write_server_python(path: Path) -> Path:
    path.write_text(f'#!/bin/sh\ncase "$*" in *"version(\'sglang\')"*) exit 0 ;; esac\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path
