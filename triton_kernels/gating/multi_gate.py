"""multi_gate_combine and its backward: a program takes a sample, or a piece of its width, and reads each expert once for all gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.ops.gating.multi_gate import check_masks
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, raw
from taskloom.triton_kernels.masked.entries import divided, load_entries, store_entries

# Accumulators of a program: gates times places of the width.
ACCUMULATORS = 4096


@triton.jit
def _allowed(mask, gate, expert, gates, experts, MASK: tl.constexpr):
    """Which gates may read which experts; of column vectors and row vectors, or of vectors and one expert."""
    inside = (gate < gates) & (expert < experts)
    if MASK:
        inside = inside & (tl.load(mask + gate * experts + expert, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _tops(logits, allowed, OWN: tl.constexpr, SIGMOID: tl.constexpr):
    """What turns a gate's logits into weights: the largest, the sum of exponentials, and whether the gate is a sigmoid."""
    largest = tl.max(tl.where(allowed, logits, float("-inf")), axis=1)
    total = tl.sum(tl.where(allowed, tl.exp(logits - largest[:, None]), 0.0), axis=1)
    number = tl.sum(allowed.to(tl.int32), axis=1)
    if SIGMOID:
        single = number >= 0
    elif OWN:
        single = number == 1
    else:
        single = number < 0
    # A gate without experts has no weights: on a GPU nobody waits to say so, and its results are NaN.
    total = tl.where(number == 0, float("nan"), tl.where(single, 0.0, total))
    return largest, total, single


@triton.jit
def _weights(logits, allowed, largest, total, single, WIDE: tl.constexpr):
    power = tl.exp(tl.where(single, -logits, logits - largest))
    below = tl.where(single, 1 + power, total)
    # A softmax divides the power, a sigmoid 1.
    weight = divided(tl.where(single, 1.0, power).to(power.dtype), below, WIDE)
    return tl.where(allowed, weight, 0.0)


@triton.jit
def multi_gate_combine_kernel(
    logits,
    z,
    mask,
    self_logits,
    self_mask,
    out,
    probs,
    gates,
    experts,
    width,
    MASK: tl.constexpr,
    SELF: tl.constexpr,
    SIGMOID: tl.constexpr,
    WIDE: tl.constexpr,
    GATES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights of one sample's gates, and some places of their sums over the experts."""
    sample = tl.program_id(0).to(tl.int64)
    gate, expert = tl.arange(0, GATES), tl.arange(0, EXPERTS)
    pairs = gate[:, None] * experts + expert[None, :]
    row = sample * gates * experts
    present = (gate[:, None] < gates) & (expert[None, :] < experts)
    allowed = _allowed(mask, gate[:, None], expert[None, :], gates, experts, MASK)
    said = load_entries(logits + row, pairs, allowed, WIDE)
    largest, total, single = _tops(said, allowed, False, SIGMOID)
    if tl.program_id(1) == 0:
        weights = _weights(said, allowed, largest[:, None], total[:, None], single[:, None], WIDE)
        tl.store(probs + row + pairs, weights, mask=present)
    if SELF:
        own = _allowed(self_mask, gate[:, None], expert[None, :], gates, experts, True)
        own_said = load_entries(self_logits + row, pairs, own, WIDE)
        own_largest, own_total, own_single = _tops(own_said, own, True, False)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    summed = tl.zeros([GATES, BLOCK], tl.float64 if WIDE else tl.float32)
    e = 0
    while e < experts:
        reads = _allowed(mask, gate, e, gates, experts, MASK)
        column = load_entries(logits + row, gate * experts + e, reads, WIDE)
        weight = _weights(column, reads, largest, total, single, WIDE)
        if SELF:
            owns = _allowed(self_mask, gate, e, gates, experts, True)
            column = load_entries(self_logits + row, gate * experts + e, owns, WIDE)
            weight += _weights(column, owns, own_largest, own_total, own_single, WIDE)
            reads = reads | owns
        anybody = tl.max(reads.to(tl.int32), axis=0) > 0
        values = load_entries(z, (sample * experts + e) * width + place, inside & anybody, WIDE)
        # What a gate may not read is not multiplied by 0: it may be NaN.
        summed += tl.where(reads[:, None], weight[:, None] * values[None, :], 0.0)
        e += 1
    # A gate without experts has read nothing; NaN says so.
    if MASK:
        summed = tl.where((total != total)[:, None], total[:, None], summed)
    if SELF:
        summed = tl.where((own_total != own_total)[:, None], own_total[:, None], summed)
    offsets = (sample * gates + gate[:, None]) * width + place[None, :]
    store_entries(out, offsets, summed, (gate[:, None] < gates) & inside[None, :])


@triton.jit
def _slopes(weights, slopes, allowed, single):
    """What gradients of weights are as those of logits."""
    inner = tl.sum(weights * slopes, axis=1)
    by_softmax = weights * (slopes - inner[:, None])
    return tl.where(allowed, tl.where(single[:, None], weights * (1 - weights) * slopes, by_softmax), 0.0)


@triton.jit
def multi_gate_combine_backward_kernel(
    gradient,
    for_probs,
    logits,
    z,
    mask,
    self_logits,
    self_mask,
    for_logits,
    for_z,
    for_self,
    gates,
    experts,
    width,
    MASK: tl.constexpr,
    SELF: tl.constexpr,
    SIGMOID: tl.constexpr,
    PROBS: tl.constexpr,
    FOR_LOGITS: tl.constexpr,
    FOR_Z: tl.constexpr,
    FOR_SELF: tl.constexpr,
    WIDE: tl.constexpr,
    GATES: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of one sample; each of its experts is read once."""
    sample = tl.program_id(0).to(tl.int64)
    gate, expert = tl.arange(0, GATES), tl.arange(0, EXPERTS)
    pairs = gate[:, None] * experts + expert[None, :]
    row = sample * gates * experts
    present = (gate[:, None] < gates) & (expert[None, :] < experts)
    allowed = _allowed(mask, gate[:, None], expert[None, :], gates, experts, MASK)
    said = load_entries(logits + row, pairs, allowed, WIDE)
    largest, total, single = _tops(said, allowed, False, SIGMOID)
    if SELF:
        own = _allowed(self_mask, gate[:, None], expert[None, :], gates, experts, True)
        own_said = load_entries(self_logits + row, pairs, own, WIDE)
        own_largest, own_total, own_single = _tops(own_said, own, True, False)
    slopes = tl.zeros([GATES, EXPERTS], tl.float64 if WIDE else tl.float32)
    first = 0
    while first < width:
        place = first + tl.arange(0, BLOCK)
        inside = place < width
        offsets = (sample * gates + gate[:, None]) * width + place[None, :]
        back = load_entries(gradient, offsets, (gate[:, None] < gates) & inside[None, :], WIDE)
        e = 0
        while e < experts:
            reads = _allowed(mask, gate, e, gates, experts, MASK)
            column = load_entries(logits + row, gate * experts + e, reads, WIDE)
            weight = _weights(column, reads, largest, total, single, WIDE)
            if SELF:
                owns = _allowed(self_mask, gate, e, gates, experts, True)
                column = load_entries(self_logits + row, gate * experts + e, owns, WIDE)
                weight += _weights(column, owns, own_largest, own_total, own_single, WIDE)
                reads = reads | owns
            at = (sample * experts + e) * width + place
            if FOR_LOGITS or FOR_SELF:
                anybody = tl.max(reads.to(tl.int32), axis=0) > 0
                values = load_entries(z, at, inside & anybody, WIDE)
                products = tl.sum(tl.where(reads[:, None], back * values[None, :], 0.0), axis=1)
                slopes += tl.where(expert[None, :] == e, products[:, None], 0.0)
            if FOR_Z:
                store_entries(for_z, at, tl.sum(tl.where(reads[:, None], weight[:, None] * back, 0.0), axis=0), inside)
            e += 1
        first += BLOCK
    if FOR_SELF:
        weights = _weights(own_said, own, own_largest[:, None], own_total[:, None], own_single[:, None], WIDE)
        store_entries(for_self + row, pairs, _slopes(weights, tl.where(own, slopes, 0.0), own, own_single), present)
    if FOR_LOGITS:
        if PROBS:
            slopes += load_entries(for_probs + row, pairs, allowed, WIDE)
        weights = _weights(said, allowed, largest[:, None], total[:, None], single[:, None], WIDE)
        store_entries(for_logits + row, pairs, _slopes(weights, tl.where(allowed, slopes, 0.0), allowed, single), present)


def _blocks(gates: int, experts: int, width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(gates)
    most = max(32, ACCUMULATORS // padded) if not INTERPRETED else 1 << 12
    return {
        "GATES": padded,
        "EXPERTS": triton.next_power_of_2(experts),
        "BLOCK": min(triton.next_power_of_2(max(width, 1)), most),
    }


def multi_gate_combine(
    logits: Tensor, z: Tensor, mask: Tensor | None, activation: str, self_logits: Tensor | None, self_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch :func:`taskloom.multi_gate_combine`."""
    if logits.is_cpu:
        check_masks("multi_gate_combine", mask, self_mask)
    batch, gates, experts = logits.shape
    width = z.shape[2]
    dtype = accumulation_dtype(logits, z, self_logits)
    out = torch.empty((batch, gates, width), dtype=z.dtype, device=z.device)
    probs = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    said, values = flat(logits), flat(z)
    beside = [said if one is None else flat(one) for one in (mask, self_logits, self_mask)]
    blocks = _blocks(gates, experts, width)
    grid = (batch, max(1, triton.cdiv(width, blocks["BLOCK"])))
    constants = {"MASK": mask is not None, "SELF": self_logits is not None, "SIGMOID": activation == "sigmoid"}
    given = (said, values, *beside, raw(out), probs, gates, experts, width)
    launch(multi_gate_combine_kernel, grid, *given, WIDE=dtype == torch.float64, **constants, **blocks)
    return out, probs


def multi_gate_combine_backward(
    gradient: Tensor,
    for_probs: Tensor | None,
    logits: Tensor,
    z: Tensor,
    mask: Tensor | None,
    activation: str,
    self_logits: Tensor | None,
    self_mask: Tensor | None,
    for_logits: bool,
    for_z: bool,
    for_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward op."""
    if logits.is_cpu:
        check_masks("multi_gate_combine_backward", mask, self_mask)
    batch, gates, experts = logits.shape
    width = z.shape[2]
    wide = accumulation_dtype(logits, z, self_logits) == torch.float64
    wanted = ((logits, for_logits), (z, for_z), (logits if self_logits is None else self_logits, for_self and self_logits is not None))
    made = [torch.empty(one.shape if want else (0,), dtype=one.dtype, device=one.device) for one, want in wanted]
    said, values = flat(logits), flat(z)
    slopes, *beside = [said if one is None else flat(one) for one in (for_probs, mask, self_logits, self_mask)]
    constants = {"MASK": mask is not None, "SELF": self_logits is not None, "SIGMOID": activation == "sigmoid"}
    flags = dict(zip(("FOR_LOGITS", "FOR_Z", "FOR_SELF"), (want for _, want in wanted), strict=True)) | {"PROBS": for_probs is not None}
    given = (flat(gradient), slopes, said, values, *beside, *(raw(one) for one in made), gates, experts, width)
    launch(multi_gate_combine_backward_kernel, (batch,), *given, WIDE=wide, **constants, **flags, **_blocks(gates, experts, width))
    dlogits, dz, dself = made
    return dlogits, dz, dself
