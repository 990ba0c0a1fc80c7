"""Every kernel compiles for every target, spills nothing, keeps to shared memory, and contracts nothing that decides."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from variants import Variant, kernel_modules, variants

TARGETS = (80, 90, 100)
VARIANTS = list(variants())
# What every architecture gives a block of threads without asking for more.
SHARED_BYTES = 48 * 1024
# Kernels of products and exponentials: they contract, and decide nothing. Tiles of products ask for more shared memory, which every GPU
# from 8.0 on has.
CONTRACTING = {"rmm_down_kernel", "rmm_up_kernel", "see_products_kernel", "see_logits_kernel", "slopes_kernel"}
CONTRACTING |= {"channel_scale_kernel", "channel_scale_backward_kernel"}
CONTRACTING |= {"batch_norm_silu_kernel", "batch_norm_silu_backward_kernel", "batch_norm_sums_kernel", "batch_moments_kernel"}
CONTRACTING |= {"feature_gate_kernel", "feature_gate_thin_kernel", "feature_gate_up_kernel"}
CONTRACTING |= {"topk_gate_backward_kernel"}
CONTRACTING |= {"window_group_norm_silu_kernel", "window_group_norm_silu_backward_kernel"}
CONTRACTING |= {"lowrank_apply_kernel", "lowrank_merge_kernel", "lowrank_norm_kernel"}
CONTRACTING |= {"window_forward_kernel", "window_input_kernel", "window_weight_kernel"}
CONTRACTING |= {"prefix_conv2d_kernel", "input_gradient_kernel", "weight_gradient_kernel"}
CONTRACTING |= {"multi_gate_combine_kernel", "multi_gate_combine_backward_kernel"}
CONTRACTING |= {"stream_softmax_partial_kernel", "stream_softmax_fold_kernel"}
MORE_SHARED_BYTES = {"see_products_kernel": 99 * 1024}
# A 64-bit division is a call, around which a register or two may be saved; spills in a loop would be more.
CALL_BYTES = 16
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _pairs() -> list[object]:
    pairs, seen = [], set()
    for number, variant in enumerate(VARIANTS):
        for target in TARGETS:
            # The first variant for the middle target stands for a kernel where the others would take minutes.
            first = target == 90 and variant.name not in seen
            marks = [] if first else [pytest.mark.slow]
            pairs.append(pytest.param(variant, target, id=f"{variant.name}-{number}-sm{target}", marks=marks))
        seen.add(variant.name)
    return pairs


def _kernels() -> set[str]:
    return {name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")}


def test_every_kernel_is_launched() -> None:
    assert {variant.name for variant in VARIANTS} == _kernels()


@pytest.mark.parametrize(("variant", "target"), _pairs())
def test_compiles(variant: Variant, target: int, tmp_path: Path) -> None:
    kernel = variant.kernel
    place = {name: number for number, name in enumerate(kernel.arg_names)}
    signature = dict(variant.types) | {name: "constexpr" for name, _ in variant.constants}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(place[name],): value for name, value in variant.constants},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in variant.multiples},
    )
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert compiled.metadata.shared <= MORE_SHARED_BYTES.get(variant.name, SHARED_BYTES)
    assert variant.name in CONTRACTING or not re.findall(r"\bfma\.\w+\.f(?:32|64)", compiled.asm["ptx"])
    assert "tf32" not in compiled.asm["ptx"]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    used = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", report)
    assert used is not None, report
    stack, local = map(int, used.groups())
    assert stack <= CALL_BYTES
    assert local == 0
