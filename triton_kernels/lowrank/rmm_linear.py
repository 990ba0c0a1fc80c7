"""rmm_linear: one kernel that takes x down to the rank, one that takes the result up to the outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.ops.lowrank.rmm_linear import check_task_range
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, raw
from taskloom.triton_kernels.masked.entries import load_entries, store_entries

# A block of rows by a padded rank above this does not stay in registers.
MOST_RANK = 128


@triton.jit
def rmm_down_kernel(
    x,
    task,
    mean,
    basis,
    coefficients,
    inner,
    count,
    positions,
    width,
    rank,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """X V_t [count, width] with each row's task's vectors V_t, from their mean and directions; x is read once."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    known = rows < count
    chosen = tl.load(task + rows, mask=known, other=0).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    summed = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    first = 0
    while first < positions:
        place = first + tl.arange(0, BLOCK_POSITIONS)
        there = place < positions
        values = load_entries(x, rows[:, None] * positions + place[None, :], known[:, None] & there[None, :], False)
        both = there[:, None] & (entry < width)[None, :]
        vectors = load_entries(mean, place[:, None] * width + entry[None, :], both, False)
        summed = tl.dot(values, vectors, summed, input_precision="ieee")
        k = 0
        while k < rank:
            scale_at = (chosen[:, None] * positions + place[None, :]) * rank + k
            scale = load_entries(coefficients, scale_at, known[:, None] & there[None, :], False)
            vectors = load_entries(basis, (place[:, None] * rank + k) * width + entry[None, :], both, False)
            summed = tl.dot(values * scale, vectors, summed, input_precision="ieee")
            k += 1
        first += BLOCK_POSITIONS
    tl.store(inner + rows[:, None] * width + entry[None, :], summed, mask=known[:, None] & (entry < width)[None, :])


@triton.jit
def rmm_up_kernel(
    inner,
    task,
    mean,
    basis,
    coefficients,
    out,
    count,
    positions,
    width,
    rank,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Inner V_t^T [count, positions] with each row's task's vectors V_t; each direction is scaled after its product."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    known = rows < count
    chosen = tl.load(task + rows, mask=known, other=0).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    values = tl.load(inner + rows[:, None] * width + entry[None, :], mask=known[:, None] & (entry < width)[None, :], other=0)
    place = tl.program_id(1) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    there = place < positions
    both = (entry < width)[:, None] & there[None, :]
    vectors = load_entries(mean, place[None, :] * width + entry[:, None], both, False)
    summed = tl.dot(values, vectors, input_precision="ieee")
    k = 0
    while k < rank:
        vectors = load_entries(basis, (place[None, :] * rank + k) * width + entry[:, None], both, False)
        product = tl.dot(values, vectors, input_precision="ieee")
        scale_at = (chosen[:, None] * positions + place[None, :]) * rank + k
        summed += product * load_entries(coefficients, scale_at, known[:, None] & there[None, :], False)
        k += 1
    store_entries(out, rows[:, None] * positions + place[None, :], summed, known[:, None] & there[None, :])


def rmm_linear(
    x: Tensor, task: Tensor, mean_a: Tensor, basis_a: Tensor, coef_a: Tensor, mean_b: Tensor, basis_b: Tensor, coef_b: Tensor
) -> Tensor:
    """Launch :func:`taskloom.rmm_linear`; torch's products serve float64 and wide ranks."""
    check_task_range(task, coef_a.shape[0])
    parts = (mean_a, basis_a, coef_a, mean_b, basis_b, coef_b)
    width = mean_a.shape[1]
    padded = max(16, triton.next_power_of_2(width))
    if accumulation_dtype(x, *parts) == torch.float64 or padded > MOST_RANK:
        return reference.rmm_linear(x, task, *parts)
    # Factors that were widened from 16 bits alone could be multiplied as TF32; these are small.
    mean_a, basis_a, mean_b, basis_b = (part.float().contiguous() for part in (mean_a, basis_a, mean_b, basis_b))
    (count, inputs), outputs = x.shape, mean_a.shape[0]
    inner = torch.empty(count, width, dtype=torch.float32, device=x.device)
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    task = task.contiguous()
    block_rows = 64 if INTERPRETED else 16
    constants = {"BLOCK_ROWS": block_rows, "BLOCK_POSITIONS": 64 if INTERPRETED else 32, "WIDTH": padded}
    high = triton.cdiv(count, block_rows)
    down = (flat(x), task, mean_b, basis_b, flat(coef_b), inner, count, inputs, width, basis_b.shape[1])
    launch(rmm_down_kernel, (high,), *down, **constants)
    up = (inner, task, mean_a, basis_a, flat(coef_a), raw(out), count, outputs, width, basis_a.shape[1])
    launch(rmm_up_kernel, (high, triton.cdiv(outputs, constants["BLOCK_POSITIONS"])), *up, **constants)
    return out
