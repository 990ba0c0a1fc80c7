"""The device functions that every kernel shares, against torch: conversions, bits, random words, keep limits, quotients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.masked.philox import philox_words
from taskloom.reference.masked.select import keep_limit as reference_keep_limit
from taskloom.triton_kernels.launch import launch, raw
from taskloom.triton_kernels.masked import entries, sparse_merge_kernels

BLOCK = 4096


@triton.jit
def convert_kernel(values, out, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    entries.store_entries(out, offsets, entries.load_entries(values, offsets, offsets >= 0, WIDE), offsets >= 0)


@triton.jit
def words_kernel(row, out, BLOCK: tl.constexpr):
    words = sparse_merge_kernels.random_words(row, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), words)


@triton.jit
def limits_kernel(probabilities, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, sparse_merge_kernels.keep_limit(tl.load(probabilities + offsets)))


@triton.jit
def quotients_kernel(numerator, denominator, out, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, entries.divided(tl.load(numerator + offsets), tl.load(denominator + offsets), WIDE))


class _Kernel:
    """Notes what it is launched with."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.options.update(options)


def test_launches_forbid_contraction() -> None:
    kernel = _Kernel()
    launch(kernel, (1,), torch.ones(1), BLOCK=8)
    assert kernel.options == {"BLOCK": 8, "num_warps": 4, "enable_fp_fusion": False}
    kernel.options.clear()
    launch(kernel, (0, 3), torch.ones(1), BLOCK=8)
    assert kernel.options == {}


def _random_bits(dtype: torch.dtype) -> Tensor:
    """Values of every kind: random bits, so NaN, infinities, subnormals and numbers half way between two of a narrower dtype."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (BLOCK,), dtype=torch.int64, generator=torch.Generator().manual_seed(3))
    if dtype == torch.float32:
        bits[::3] &= ~0x7FFF
        bits[1::5] &= ~0xFFF
    return bits.to(integer).view(dtype)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_conversions_round_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    values = _random_bits(source)
    out = torch.empty(BLOCK, dtype=target)
    wide = torch.float64 in (source, target)
    launch(convert_kernel, (1,), raw(values), raw(out), WIDE=wide, BLOCK=BLOCK)
    expected = values.to(target)
    assert out.isnan().equal(expected.isnan())
    numbers = ~expected.isnan()
    assert out[numbers].view(torch.uint8).equal(expected[numbers].view(torch.uint8))


@pytest.mark.parametrize(("seed", "key"), [(0, 0), (7, 2**63 + 11), (2**64 - 1, 0x9E3779B97F4A7C15)])
@pytest.mark.parametrize("block", [8, 256])
def test_random_words_are_those_of_the_reference(seed: int, key: int, block: int) -> None:
    signed = [word - (1 << 64) if word >= 1 << 63 else word for word in (key, seed)]
    row = torch.tensor([0, 0, *signed, 0], dtype=torch.int64)
    out = torch.empty(3 * block, dtype=torch.int64)
    launch(words_kernel, (3,), row, out, BLOCK=block)
    assert out.equal(philox_words(seed, key, 3 * block, torch.device("cpu")))


def test_keep_limits_round_to_even() -> None:
    probabilities = torch.rand(BLOCK, generator=torch.Generator().manual_seed(1))
    probabilities[:512] *= 2.0**-24
    # Halves of 2^-32: limits lie exactly between two integers.
    probabilities[512:1024] = (torch.arange(512) + 0.5) * 2.0**-32
    probabilities[-2:] = torch.tensor([0.0, 1.0])
    out = torch.empty(BLOCK, dtype=torch.int64)
    launch(limits_kernel, (1,), probabilities, out, BLOCK=BLOCK)
    assert out.equal(reference_keep_limit(probabilities))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quotients_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    numerator, denominator = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    out = torch.empty(BLOCK, dtype=dtype)
    launch(quotients_kernel, (1,), numerator, denominator, out, WIDE=dtype == torch.float64, BLOCK=BLOCK)
    assert out.equal(numerator / denominator)
