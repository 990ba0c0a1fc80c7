"""The kernel of products at a model's width: tensor cores multiply 16-bit factors, and float32 is never rounded to TF32."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taskloom.triton_kernels.masked.weighted_ce_kernels import see_products_kernel

launcher = importlib.import_module("taskloom.triton_kernels.masked.weighted_ce")

INSTRUCTIONS = {80: r"mma\.sync\S*\.f32\.{0}\.{0}\.f32", 90: r"wgmma\.mma_async\S*\.f32\.{0}\.{0}", 100: r"tcgen05\.mma\S*kind::f16"}
POINTERS = {"*bf16": "bf16", "*fp16": "f16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDTH = 4096


def _compiled(pointer: str, rows: int, target: int) -> triton.compiler.CompiledKernel:
    exact = pointer == "*fp32"
    constants = {"WIDTH": WIDTH, "EXACT": exact, **launcher._blocks(rows, WIDTH, exact)}
    types = dict.fromkeys(("hidden", "head"), pointer) | dict.fromkeys(("places", "targets"), "*i64")
    types |= dict.fromkeys(("largest", "sums", "chosen"), "*fp32")
    place = {name: number for number, name in enumerate(see_products_kernel.arg_names)}
    source = ASTSource(
        see_products_kernel,
        types | dict.fromkeys(("count", "vocabulary", "span"), "i32") | dict.fromkeys(constants, "constexpr"),
        constexprs={(place[name],): value for name, value in constants.items()},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in types},
    )
    options = {"num_warps": 4 if exact else 8, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _assert_no_spill(compiled: triton.compiler.CompiledKernel, folder: Path) -> None:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 .*LOCAL:0", report), report


@pytest.mark.parametrize(
    ("pointer", "target", "rows"),
    [
        pytest.param(pointer, target, rows, marks=[] if (target, rows) == (90, 2048) else [pytest.mark.slow])
        for pointer in POINTERS
        for target in INSTRUCTIONS
        for rows in (2048, 40, 8)
    ],
)
def test_tensor_cores_multiply(pointer: str, target: int, rows: int, tmp_path: Path) -> None:
    compiled = _compiled(pointer, rows, target)
    # Blocks of 16 rows are below what the later instructions take.
    wanted = INSTRUCTIONS[target if rows > 16 else 80].format(POINTERS[pointer])
    assert re.search(wanted, compiled.asm["ptx"])
    assert "fma.rn.f32" not in compiled.asm["ptx"]
    _assert_no_spill(compiled, tmp_path)


@pytest.mark.parametrize("target", INSTRUCTIONS)
def test_float32_is_multiplied_as_float32(target: int, tmp_path: Path) -> None:
    compiled = _compiled("*fp32", 2048, target)
    assert "fma.rn.f32" in compiled.asm["ptx"]
    assert "tf32" not in compiled.asm["ptx"]
    _assert_no_spill(compiled, tmp_path)
