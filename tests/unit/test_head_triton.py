"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for a GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch

from sdpg_megatron.head.divergences import Form
from sdpg_megatron.head.tile import WeightedLogRatio
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
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@dataclass(frozen=True)
class Compiled:
    ptx: str
    usage: str
    """Registers and memory of a thread, as NVIDIA's cuobjdump says."""

    @property
    def reads(self) -> int:
        """Reads and copies of four numbers at once. Nothing but tiles is read that way."""
        lines = self.ptx.splitlines()
        return sum(("ld.global" in line and ".v4" in line) or "cp.async.cg.shared.global" in line for line in lines)

    @property
    def spills(self) -> bool:
        return not ("STACK:0 " in self.usage and "LOCAL:0 " in self.usage)


POINTERS = {"labels_C": "*i64", "found_KC": "*fp64", "found_2C": "*fp64", "sums_NC": "*fp64", "parts_RKC": "*fp64"}
POINTERS |= {"joined_KC": "*fp64"}
"""All others are of float32."""


def compiled(function: Any, constants: dict[str, Any], out: str = "*fp32", **options: int) -> Compiled:
    """A kernel as made for float32 logits; `constants` are its constexprs and the arguments that are None."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("out_CV", "out_V"):
            return out
        return POINTERS.get(name) or ("*fp32" if name.endswith(("C", "V", "scale")) else "i32")

    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if kind(name) != "constexpr"},
    )
    made = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32), options=options)
    return Compiled(str(made.asm["ptx"]), resource_usage(made.asm["cubin"]))


def resource_usage(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`compiled`, with a cache that is empty."""
    pytest.importorskip("triton", minversion="3.3")  # since then ASTSource takes what `compiled` gives it
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs TRITON_INTERPRET unset: nothing is compiled in the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compiled


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted_log_ratio", [None, *WeightedLogRatio])
def test_measure_compiles_and_reads_each_logit_once(
    compiler: Any, weighted_log_ratio: WeightedLogRatio | None, masked: bool
) -> None:
    """8 columns a thread and block, copied to shared memory while `STAGES` - 1 blocks before it are worked on."""
    from sdpg_megatron.head import tile_triton

    constants = {
        "LOG_RATIO_WEIGHT": (weighted_log_ratio or WeightedLogRatio.NONE).value,
        "LOWEST": torch.finfo(torch.float32).min,
        "MASKED": masked,
    }
    constants |= {"BLOCK": tile_triton.LOOP_BLOCK, "STAGES": tile_triton.STAGES}
    if weighted_log_ratio is None:
        constants["teacher_CV"] = None
    found = compiler(
        tile_triton._measure_row,
        constants,
        num_warps=tile_triton.WARPS,
        maxnreg=tile_triton.REGISTERS[masked],
    )
    assert found.reads == 2 * tile_triton.STAGES * (2 if weighted_log_ratio else 1) and "cp.async" in found.ptx
    assert not found.spills


def test_mixture_compiles_and_reads_each_logit_once(compiler: Any) -> None:
    from sdpg_megatron.head import tile_triton

    constants = {
        "LOG_STUDENT_MIX": -0.7,
        "LOG_TEACHER_MIX": -0.7,
        "BLOCK": tile_triton.LOOP_BLOCK,
        "STAGES": tile_triton.STAGES,
    }
    found = compiler(tile_triton._measure_mixture_row, constants, num_warps=tile_triton.WARPS)
    assert found.reads == 2 * tile_triton.STAGES * 2 and "cp.async" in found.ptx
    assert not found.spills


@pytest.mark.parametrize("name", PARTS)
def test_gradient_compiles_and_reads_each_logit_once(compiler: Any, name: str) -> None:
    from sdpg_megatron.head import tile_triton

    constants: dict[str, Any] = {
        "LOG_STUDENT_MIX": -0.7,
        "LOG_TEACHER_MIX": -0.7,
        "MASKED": False,
        "BLOCK": tile_triton.BLOCK,
    }
    constants |= {f"{part}_C": None for parts in PARTS.values() for part in parts if part not in PARTS[name]}
    has_teacher = {"teacher", "teacher_weight", "mixture"} & set(PARTS[name])
    if not has_teacher:
        constants |= dict.fromkeys(("teacher_CV", "teacher_max_C", "log_sum_C", "teacher_log_sum_C"))
    in_place, narrow = (
        compiler(tile_triton._gradient_block, constants, out=out, num_warps=tile_triton.WARPS)
        for out in ("*fp32", "*bf16")
    )
    assert in_place.reads == narrow.reads == (8 if has_teacher else 4)  # of 16 columns a thread
    assert "cvt.rn.bf16" in narrow.ptx and "cvt.rn.bf16" not in in_place.ptx
    assert not in_place.spills and not narrow.spills


@pytest.mark.parametrize("form", Form)
def test_functions_of_rows_compile(compiler: Any, form: Form) -> None:
    from sdpg_megatron.head import rows_triton

    has_teacher = form is not Form.NONE
    constants: dict[str, Any] = {
        "FORM": form.value if has_teacher else None,
        "STUDENT_MIX": 0.3,
        "BLOCK": rows_triton.BLOCK,
    }
    assert not compiler(rows_triton._terms, constants).spills
    constants |= {"FORM": form.value, "INV_TEMPERATURE": 1.7} | ({} if has_teacher else {"divergence_C": None})
    assert not compiler(rows_triton._coefficients, constants).spills


@pytest.mark.parametrize("weighted_log_ratio", [None, *WeightedLogRatio])
def test_join_compiles(compiler: Any, weighted_log_ratio: WeightedLogRatio | None) -> None:
    from sdpg_megatron.head import rows_triton

    constants = {
        "HAS_TEACHER": weighted_log_ratio is not None,
        "LOG_RATIO_WEIGHT": (weighted_log_ratio or WeightedLogRatio.NONE).value,
        "BLOCK": rows_triton.BLOCK,
    }
    assert not compiler(rows_triton._join, constants).spills


def test_scaling_compiles_and_reads_each_number_once(compiler: Any) -> None:
    from sdpg_megatron.head import tile_triton

    constants = {"BLOCK": tile_triton.BLOCK}
    found = compiler(tile_triton._scale_block, constants, out="*bf16", num_warps=tile_triton.WARPS)
    assert found.reads == 4 and "cvt.rn.bf16" in found.ptx  # of 16 numbers a thread
    assert not found.spills
