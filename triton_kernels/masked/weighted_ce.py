"""weighted_ce and its backward.

Forward is one kernel: a program multiplies a block of supervised rows by tiles of the head and keeps, in registers, the largest logit and
the sum of exponentials, so that no logit goes to memory. Backward would have to multiply each tile of logits twice more, by the
head and by hidden, with sums as wide as D, which registers do not hold; there the tiles come from torch's products (cuBLAS) into a bounded
buffer, a kernel turns them into gradients of the logits, and two more products use them.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, entries_per_program, flat, launch, raw
from taskloom.triton_kernels.masked.weighted_ce_kernels import see_logits_kernel, see_products_kernel, slopes_kernel

# Of the logits that backward holds at a time, in bytes and rows: enough for products at full speed, little beside a head.
PIECE_BYTES = 64 << 20
PIECE_ROWS = 1 << 14
# Programs that keep the largest GPU busy when the rows alone do not.
BUSY = 1024


def _picked(targets: Tensor, factors: Tensor, vocabulary: int) -> Tensor:
    """The rows whose factor is not 0, in order; raises for a target among them that is no word. Waits for the device."""
    places = factors.nonzero()[:, 0]
    chosen = targets[places]
    if places.numel() and bool(((chosen < 0) | (chosen >= vocabulary)).any()):
        raise RuntimeError(f"targets: expected 0 to {vocabulary - 1} at every row that counts")
    return places


def _blocks(count: int, width: int, exact: bool) -> dict[str, int]:
    """Rows, words and depth of a program's tiles."""
    if INTERPRETED:
        return {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 512, "BLOCK_WIDTH": max(16, triton.next_power_of_2(width))}
    if exact:
        return {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_WIDTH": 16}
    return {"BLOCK_ROWS": 128 if count > 64 else 64 if count > 16 else 16, "BLOCK_COLUMNS": 128, "BLOCK_WIDTH": 64}


def _factors(tensor: Tensor) -> Tensor:
    """The tensor as the kernel of products takes it: the interpreter would multiply the bits of bfloat16, so it converts them itself."""
    return flat(tensor) if INTERPRETED else tensor.contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product as float32 sums (float64 for float64), not rounded to the factors' dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _columns(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Words of a piece of logits."""
    fitting = PIECE_BYTES // (dtype.itemsize * max(1, rows))
    return min(vocabulary, max(1, fitting // 256) * 256)


class _Seen:
    """Of each picked row and part of the vocabulary, its largest logit and its sum of exponentials; and its target's logit."""

    def __init__(self, parts: int, like: Tensor, dtype: torch.dtype) -> None:
        rows = like.numel()
        self.largest, self.sums = (torch.empty(parts, rows, dtype=dtype, device=like.device) for _ in range(2))
        self.chosen = torch.empty(rows, dtype=dtype, device=like.device)

    def log_sum_exp(self) -> Tensor:
        return torch.logsumexp(self.largest.double() + self.sums.double().log(), 0)


def _see_products(hidden: Tensor, weight: Tensor, targets: Tensor, places: Tensor) -> _Seen:
    count, (vocabulary, width) = places.numel(), weight.shape
    exact = hidden.dtype == torch.float32
    blocks = _blocks(count, width, exact)
    tiles, high = triton.cdiv(vocabulary, blocks["BLOCK_COLUMNS"]), triton.cdiv(count, blocks["BLOCK_ROWS"])
    per_part = triton.cdiv(tiles, min(tiles, triton.cdiv(1 if INTERPRETED else BUSY, high)))
    seen = _Seen(triton.cdiv(tiles, per_part), places, torch.float32)
    arguments = (_factors(hidden), _factors(weight), places, targets, seen.largest, seen.sums, seen.chosen)
    sizes = (count, vocabulary, per_part * blocks["BLOCK_COLUMNS"])
    constants = {"WIDTH": width, "EXACT": exact or INTERPRETED, **blocks}
    launch(see_products_kernel, (high, len(seen.largest)), *arguments, *sizes, num_warps=4 if exact else 8, **constants)
    return seen


def _see_pieces(hidden: Tensor, weight: Tensor, targets: Tensor, places: Tensor) -> _Seen:
    """The same by torch's products, a piece at a time: for float64, which not every GPU's ``tl.dot`` multiplies, and for mixed dtypes.

    Triton 3.6 multiplies float32 that it has widened from 16 bits as TF32 on compute capability 10.0, whatever precision is asked for.
    """
    dtype = accumulation_dtype(hidden, weight)
    compact, vocabulary = hidden[places].to(dtype), weight.shape[0]
    columns = _columns(places.numel(), vocabulary, dtype)
    seen = _Seen(triton.cdiv(vocabulary, columns), places, dtype)
    for part, begin in enumerate(range(0, vocabulary, columns)):
        logits = _product(compact, weight[begin : begin + columns].to(dtype).t())
        _see_rows(logits, targets, places, seen, part, begin, compact=True)
    return seen


def _see_rows(logits: Tensor, targets: Tensor, places: Tensor, seen: _Seen, part: int, begin: int, *, compact: bool) -> None:
    columns = logits.shape[1]
    constants = {"COMPACT": compact, "WIDE": seen.chosen.dtype == torch.float64, "BLOCK": _words_per_program(columns)}
    arguments = (flat(logits), places, targets, seen.largest[part], seen.sums[part], seen.chosen, begin, columns)
    launch(see_logits_kernel, (places.numel(),), *arguments, **constants)


def _words_per_program(columns: int) -> int:
    return entries_per_program(columns) if INTERPRETED else min(4096, max(256, triton.next_power_of_2(columns)))


def weighted_ce(hidden: Tensor, weight: Tensor | None, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`taskloom.weighted_ce`."""
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise RuntimeError("weights: expected finite values of at least 0")
    dtype = accumulation_dtype(hidden, weight)
    targets = targets.contiguous()
    places = _picked(targets, weights, hidden.shape[1] if weight is None else weight.shape[0])
    if places.numel() == 0:
        raise RuntimeError("weights: there is no supervised token, every weight is 0")
    if weight is None:
        seen = _Seen(1, places, dtype)
        _see_rows(hidden, targets, places, seen, 0, 0, compact=False)
    elif dtype == torch.float64 or hidden.dtype != weight.dtype:
        seen = _see_pieces(hidden, weight, targets, places)
    else:
        seen = _see_products(hidden, weight, targets, places)
    log_sum_exp = seen.log_sum_exp()
    log_probs, factors = seen.chosen.double() - log_sum_exp, weights[places].double()
    total = factors.sum()
    loss = (-(factors * log_probs).sum() / total).to(dtype)
    rows = torch.zeros(3, len(hidden), dtype=dtype, device=hidden.device)
    rows[:, places] = torch.stack([log_probs, log_sum_exp, factors / total]).to(dtype)
    return loss, rows[0].clone(), rows[1].clone(), rows[2].clone()


def _launch_slopes(
    logits: Tensor, places: Tensor, targets: Tensor, log_sum_exp: Tensor, coefficient: Tensor, out: Tensor, begin: int, *, compact: bool
) -> None:
    rows, columns = logits.shape
    block = entries_per_program(columns)
    constants = {"COMPACT": compact, "WIDE": coefficient.dtype == torch.float64, "BLOCK": block}
    arguments = (flat(logits), places, targets, log_sum_exp.contiguous(), coefficient.contiguous(), raw(out), begin, columns)
    launch(slopes_kernel, (rows, triton.cdiv(columns, block)), *arguments, **constants)


def weighted_ce_backward(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, coefficient: Tensor, log_sum_exp: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """Launch :func:`taskloom.ops.masked.weighted_ce_backward`."""
    targets = targets.contiguous()
    places = _picked(targets, coefficient, hidden.shape[1] if weight is None else weight.shape[0])
    hidden_gradient = torch.empty(hidden.shape if for_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    if weight is None:
        if for_hidden:
            _launch_slopes(hidden, places, targets, log_sum_exp, coefficient, hidden_gradient, 0, compact=False)
        return hidden_gradient, torch.empty(0, dtype=hidden.dtype, device=hidden.device)
    weight_gradient = torch.empty(weight.shape if for_weight else (0,), dtype=weight.dtype, device=weight.device)
    dtype = accumulation_dtype(hidden, weight)
    common = hidden.dtype if hidden.dtype == weight.dtype else dtype
    compact = hidden[places].to(common)
    group = min(PIECE_ROWS, max(1, len(compact)))
    columns = _columns(group, len(weight), dtype)
    for_rows = torch.zeros(compact.shape, dtype=dtype, device=hidden.device) if for_hidden else None
    for begin in range(0, len(weight), columns):
        head = weight[begin : begin + columns].to(common)
        for_head = torch.zeros(head.shape, dtype=dtype, device=hidden.device) if for_weight else None
        for first in range(0, len(compact), group):
            rows = slice(first, first + group)
            logits = _product(compact[rows], head.t())
            slopes = logits if common == dtype else torch.empty(logits.shape, dtype=common, device=hidden.device)
            _launch_slopes(logits, places[rows], targets, log_sum_exp, coefficient, slopes, begin, compact=True)
            if for_head is not None:
                for_head += _product(slopes.t(), compact[rows])
            if for_rows is not None:
                for_rows[rows] += _product(slopes, head)
        if for_head is not None:
            weight_gradient[begin : begin + columns] = for_head
    if for_rows is not None:
        hidden_gradient.zero_()
        hidden_gradient[places] = for_rows.to(hidden.dtype)
    return hidden_gradient, weight_gradient
