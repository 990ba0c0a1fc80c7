"""lora_feature_gate and its backward: a program makes the maps of a block of rows and features from inner products, and keeps none."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, raw
from taskloom.triton_kernels.masked.entries import divided, load_entries, store_entries

# Parts of the rows over which the gradient of `up` is summed at once.
_PART_ROWS, _MOST_PARTS = 256, 16


@triton.jit
def _gate(
    inner,
    up,
    row,
    feature,
    map,
    rows,
    features,
    maps,
    rank,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A map's gates 2 sigmoid(inner up) of rows and features."""
    logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float64 if WIDE else tl.float32)
    first = 0
    while first < rank:
        ranks = first + tl.arange(0, RANKS)
        left = tl.load(
            inner + row[:, None] * (maps * rank) + (map * rank + ranks)[None, :],
            mask=(row < rows)[:, None] & (ranks < rank)[None, :],
            other=0,
        )
        right = load_entries(
            up, (map * rank + ranks)[:, None] * features + feature[None, :], (ranks < rank)[:, None] & (feature < features)[None, :], WIDE
        )
        logits += tl.dot(left, right, input_precision="ieee", out_dtype=logits.dtype)
        first += RANKS
    return 2 * divided(tl.zeros_like(logits) + 1, 1 + tl.exp(-logits), WIDE)


@triton.jit
def feature_gate_kernel(
    x,
    inner,
    up,
    weight,
    y,
    rows,
    features,
    maps,
    rank,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The features times the weighted gates, map after map."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float64 if WIDE else tl.float32)
    map = 0
    while map < maps:
        share = load_entries(weight, row * maps + map, row < rows, WIDE)
        total += share[:, None] * _gate(inner, up, row, feature, map, rows, features, maps, rank, WIDE, ROWS, COLUMNS, RANKS)
        map += 1
    values = load_entries(x, row[:, None] * features + feature[None, :], inside, WIDE)
    store_entries(y, row[:, None] * features + feature[None, :], values * total, inside)


@triton.jit
def _outer(gradient, x, gates, row, feature, rows, features, WIDE: tl.constexpr):
    """The gradient of a map's share, before features are added up; 0 outside."""
    places = row[:, None] * features + feature[None, :]
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    return load_entries(gradient, places, inside, WIDE) * load_entries(x, places, inside, WIDE) * gates


@triton.jit
def feature_gate_thin_kernel(
    gradient,
    x,
    inner,
    up,
    weight,
    thin,
    dweight,
    rows,
    features,
    maps,
    rank,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The gradients of some inner products of a map, and of its weights."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    map = tl.program_id(1)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    share = load_entries(weight, row * maps + map, row < rows, WIDE)
    sums = tl.zeros((ROWS, RANKS), dtype=tl.float64 if WIDE else tl.float32)
    for_share = tl.zeros([ROWS], tl.float64 if WIDE else tl.float32)
    first = 0
    while first < features:
        feature = first + tl.arange(0, COLUMNS)
        gates = _gate(inner, up, row, feature, map, rows, features, maps, rank, WIDE, ROWS, COLUMNS, RANKS)
        outer = _outer(gradient, x, gates, row, feature, rows, features, WIDE)
        for_share += tl.sum(outer, axis=1)
        slopes = outer * share[:, None] * (1 - 0.5 * gates)
        factors = load_entries(
            up, (map * rank + ranks)[None, :] * features + feature[:, None], (feature < features)[:, None] & (ranks < rank)[None, :], WIDE
        )
        sums += tl.dot(slopes, factors, input_precision="ieee", out_dtype=sums.dtype)
        first += COLUMNS
    tl.store(
        thin + row[:, None] * (maps * rank) + (map * rank + ranks)[None, :], sums, mask=(row < rows)[:, None] & (ranks < rank)[None, :]
    )
    store_entries(dweight, row * maps + map, for_share, (row < rows) & (tl.program_id(2) == 0))


@triton.jit
def feature_gate_up_kernel(
    gradient,
    x,
    inner,
    up,
    weight,
    dup,
    rows,
    features,
    maps,
    rank,
    part_rows,
    rank_blocks,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """The gradient of some of a map's up, from a part of the rows."""
    feature = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    map = tl.program_id(1) // rank_blocks
    ranks = tl.program_id(1) % rank_blocks * RANKS + tl.arange(0, RANKS)
    part = tl.program_id(2).to(tl.int64)
    sums = tl.zeros((RANKS, COLUMNS), dtype=tl.float64 if WIDE else tl.float32)
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    while first < last:
        row = first + tl.arange(0, ROWS)
        gates = _gate(inner, up, row, feature, map, last, features, maps, rank, WIDE, ROWS, COLUMNS, RANKS)
        share = load_entries(weight, row * maps + map, row < last, WIDE)
        slopes = _outer(gradient, x, gates, row, feature, last, features, WIDE) * share[:, None] * (1 - 0.5 * gates)
        left = tl.load(
            inner + row[None, :] * (maps * rank) + (map * rank + ranks)[:, None],
            mask=(row < last)[None, :] & (ranks < rank)[:, None],
            other=0,
        )
        sums += tl.dot(left, slopes, input_precision="ieee", out_dtype=sums.dtype)
        first += ROWS
    places = (part * maps + map) * rank * features + ranks[:, None] * features + feature[None, :]
    tl.store(dup + places, sums, mask=(ranks < rank)[:, None] & (feature < features)[None, :])


def _side_by_side(down: Tensor, dtype: torch.dtype) -> Tensor:
    """All maps' down as one matrix, [D, L r]."""
    return down.to(dtype).transpose(0, 1).reshape(down.shape[1], -1)


def _blocks(rank: int) -> dict[str, int]:
    if INTERPRETED:
        return {"ROWS": 128, "COLUMNS": 256, "RANKS": min(64, max(16, triton.next_power_of_2(rank)))}
    return {"ROWS": 32, "COLUMNS": 32, "RANKS": min(32, max(16, triton.next_power_of_2(rank)))}


@without_autocast
def lora_feature_gate(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Launch :func:`taskloom.lora_feature_gate`; the first of the two thin products is torch's own."""
    dtype = accumulation_dtype(x, down, up, weight)
    inner = torch.mm(x.to(dtype), _side_by_side(down, dtype))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_gate(x, inner, up, weight, y)
    return y, inner


def _launch_gate(x: Tensor, inner: Tensor, up: Tensor, weight: Tensor, y: Tensor) -> None:
    rows, features = x.shape
    maps, rank, _ = up.shape
    blocks = _blocks(rank)
    grid = (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(features, blocks["COLUMNS"]))
    given = (flat(x), inner, flat(up), flat(weight), raw(y))
    launch(feature_gate_kernel, grid, *given, rows, features, maps, rank, WIDE=inner.dtype == torch.float64, **blocks)


@without_autocast
def lora_feature_gate_backward(
    gradient: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    weight: Tensor,
    inner: Tensor,
    for_x: bool,
    for_down: bool,
    for_up: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward op; the products with x and down are torch's own."""
    rows, features = x.shape
    maps, rank, _ = up.shape
    blocks = _blocks(rank)
    inner = inner.contiguous()
    given = (flat(gradient), flat(x), inner, flat(up), flat(weight))
    sizes = (rows, features, maps, rank)
    wide = inner.dtype == torch.float64
    rank_blocks = triton.cdiv(rank, blocks["RANKS"])
    dx, ddown, dup, dweight = (
        torch.empty(one.shape if wanted else (0,), dtype=one.dtype, device=x.device)
        for one, wanted in ((x, for_x), (down, for_down), (up, for_up), (weight, for_weight))
    )
    if for_x or for_down or for_weight:
        thin = torch.empty_like(inner)
        shares = dweight if for_weight else torch.empty_like(weight)
        grid = (triton.cdiv(rows, blocks["ROWS"]), maps, rank_blocks)
        launch(feature_gate_thin_kernel, grid, *given, thin, raw(shares), *sizes, WIDE=wide, **blocks)
        if for_x:
            own = torch.empty(x.shape, dtype=inner.dtype, device=x.device)
            _launch_gate(gradient, inner, up, weight, own)
            dx.copy_(torch.addmm(own, thin, _side_by_side(down, inner.dtype).T))
        if for_down:
            ddown.copy_(torch.mm(x.to(inner.dtype).T, thin).reshape(features, maps, rank).transpose(0, 1))
    if for_up:
        parts = max(1, min(_MOST_PARTS, triton.cdiv(rows, _PART_ROWS)))
        part_rows = triton.cdiv(max(rows, 1), parts)
        sums = torch.empty((parts, maps, rank, features), dtype=inner.dtype, device=x.device)
        grid = (triton.cdiv(features, blocks["COLUMNS"]), maps * rank_blocks, parts)
        launch(feature_gate_up_kernel, grid, *given, sums, *sizes, part_rows, rank_blocks, WIDE=wide, **blocks)
        dup.copy_(sums.sum(0))
    return dx, ddown, dup, dweight
