"""rmm_linear: one kernel that takes x down to the rank, one that takes the result up to the outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, raw
from taskloom.triton_kernels.masked.entries import load_entries, store_entries

# A block of rows by a padded rank above this does not stay in registers.
MOST_RANK = 128
_BLOCK_ROWS, _BLOCK_POSITIONS = (64, 64) if INTERPRETED else (16, 32)
# The way down is cut into parts, of at least so many positions: the rows of a small batch alone do not keep a GPU busy. How many they are
# depends on the positions only, so that a row's bits do not depend on the other rows.
_MOST_PARTS, _LEAST_POSITIONS = 8, _BLOCK_POSITIONS if INTERPRETED else 256


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
    share,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """X V_t [parts, count, width] with each row's task's vectors V_t, from their mean and directions, ``share`` positions a part."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    known = rows < count
    chosen = tl.load(task + rows, mask=known, other=0).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    summed = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    part = tl.program_id(1)
    first = part * share
    last = tl.minimum(first + share, positions)
    while first < last:
        place = first + tl.arange(0, BLOCK_POSITIONS)
        there = place < last
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
    tl.store(inner + (part * count + rows)[:, None] * width + entry[None, :], summed, mask=known[:, None] & (entry < width)[None, :])


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
    parts,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Inner V_t^T [count, positions] with each row's task's vectors V_t; each direction is scaled after its product."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    known = rows < count
    chosen = tl.load(task + rows, mask=known, other=0).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    values = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    part = 0
    while part < parts:
        at = inner + (part * count + rows)[:, None] * width + entry[None, :]
        values += tl.load(at, mask=known[:, None] & (entry < width)[None, :], other=0)
        part += 1
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
    tasks = coef_a.shape[0]
    torch._assert_async(((task >= 0) & (task < tasks)).all(), f"rmm_linear: task: expected 0 to {tasks - 1} at every row")
    parts = (mean_a, basis_a, coef_a, mean_b, basis_b, coef_b)
    width = mean_a.shape[1]
    padded = max(16, triton.next_power_of_2(width))
    if accumulation_dtype(x, *parts) == torch.float64 or padded > MOST_RANK:
        return reference.rmm_linear(x, task, *parts)
    # Factors that were widened from 16 bits alone could be multiplied as TF32; these are small.
    mean_a, basis_a, mean_b, basis_b = (part.float().contiguous() for part in (mean_a, basis_a, mean_b, basis_b))
    (count, inputs), outputs = x.shape, mean_a.shape[0]
    share = triton.cdiv(triton.cdiv(inputs, _BLOCK_POSITIONS), max(1, min(inputs // _LEAST_POSITIONS, _MOST_PARTS))) * _BLOCK_POSITIONS
    cut = max(1, triton.cdiv(inputs, max(1, share)))
    inner = torch.empty(cut, count, width, dtype=torch.float32, device=x.device)
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    task = task.contiguous()
    constants = {"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_POSITIONS": _BLOCK_POSITIONS, "WIDTH": padded}
    high = triton.cdiv(count, _BLOCK_ROWS)
    down = (flat(x), task, mean_b, basis_b, flat(coef_b), inner, count, inputs, width, basis_b.shape[1], share)
    launch(rmm_down_kernel, (high, cut), *down, **constants)
    up = (inner, task, mean_a, basis_a, flat(coef_a), raw(out), count, outputs, width, basis_a.shape[1], cut)
    launch(rmm_up_kernel, (high, triton.cdiv(outputs, _BLOCK_POSITIONS)), *up, **constants)
    return out
