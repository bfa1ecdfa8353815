"""The names that `sdpg_megatron` exports: importable, typed, and without heavy imports until they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sdpg_megatron

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sdpg_megatron.__all__)
def test_a_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    assert getattr(sdpg_megatron, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'head_los'"):
        _ = sdpg_megatron.head_los


def test_the_package_alone_imports_nothing_heavy() -> None:
    program = "import sys, sdpg_megatron; print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_its_page_is_made_from_the_docstrings() -> None:
    program = [sys.executable, str(ROOT / "tools" / "api_reference.py"), "--check"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, f"python tools/api_reference.py\n{done.stderr}"
