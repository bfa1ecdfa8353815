"""`tile_triton` without a GPU: run in Triton's interpreter, and compiled for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpg_megatron.head.tile import Gap
from tests.head_tiles import PARTS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

COMPUTE_CAPABILITY = 90


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when first imported, and here megatron-core may have imported it."""
    pytest.importorskip("triton", minversion="3.9")  # with numpy >= 2.4, the interpreter of older ones has no loops
    file = Path(__file__).with_name("interpreted_head_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file)],
        cwd=file.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def compiled(kernel: str, constants: dict[str, Any], out: str = "*fp32") -> str:
    """PTX of a kernel, as made for float32 logits; `constants` are its constexprs and the arguments that are None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sdpg_megatron.head import tile_triton

    function = getattr(tile_triton, kernel)
    constants = {"BLOCK": tile_triton.BLOCK, **constants}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        known = {"labels_C": "*i64", "student_CV": "*fp32", "teacher_CV": "*fp32", "out_CV": out}
        return known.get(name) or ("*fp64" if name.endswith("C") else "i32")

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if kind(name) != "constexpr"},
    )
    options = {"num_warps": tile_triton.WARPS}
    made = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32), options=options)
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`compiled`, with a cache that is empty."""
    pytest.importorskip("triton", minversion="3.3")  # since then ASTSource takes what `compiled` gives it
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs TRITON_INTERPRET unset: nothing is compiled in the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compiled


def reads(ptx: str) -> int:
    """Reads of four numbers at once. Nothing but tiles is read that way."""
    return sum("ld.global" in line and ".v4" in line for line in ptx.splitlines())


@pytest.mark.parametrize("gap", [None, *Gap])
def test_measure_compiles_and_reads_each_logit_once(compiler: Any, gap: Gap | None) -> None:
    constants = {"GAP": (gap or Gap.NONE).value, "LOWEST": torch.finfo(torch.float32).min}
    if gap is None:
        constants["teacher_CV"] = None
    assert reads(compiler("_measure_row", constants)) == (8 if gap else 4)  # of 16 columns a thread and block


def test_mixture_compiles_and_reads_each_logit_once(compiler: Any) -> None:
    assert reads(compiler("_measure_mixture_row", {"LOG_KEEP": -0.7, "LOG_REST": -0.7})) == 8


@pytest.mark.parametrize("name", PARTS)
def test_gradient_compiles_and_reads_each_logit_once(compiler: Any, name: str) -> None:
    constants: dict[str, Any] = {"LOG_KEEP": -0.7, "LOG_REST": -0.7}
    constants |= {f"{part}_C": None for parts in PARTS.values() for part in parts if part not in PARTS[name]}
    taught = {"teacher", "drawn", "mixture"} & set(PARTS[name])
    if not taught:
        constants |= dict.fromkeys(("teacher_CV", "teacher_max_C", "log_sum_C", "teacher_log_sum_C"))
    in_place = compiler("_gradient_block", constants)
    narrow = compiler("_gradient_block", constants, out="*bf16")
    assert reads(in_place) == reads(narrow) == (8 if taught else 4)
    assert "cvt.rn.bf16" in narrow and "cvt.rn.bf16" not in in_place
