"""masked_compress and masked_restore beyond their contracts: round trips, errors, derivatives, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled
from contract import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import awkward, random_packed, weights

import taskloom

BITS = torch.tensor([5], dtype=torch.uint8)  # entries 0 and 2


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(0, 3000), density=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]), seed=st.integers(0, 50))
def test_round_trip(numel: int, density: float, seed: int) -> None:
    values, packed = weights(numel, seed=seed), random_packed(numel, seed=seed, density=density)
    mask = taskloom.unpack_mask(packed, (numel,))
    compressed = taskloom.masked_compress(values, packed)
    assert torch.equal(compressed, values[mask])
    assert torch.equal(taskloom.masked_restore(compressed, packed, torch.zeros(numel)), torch.where(mask, values, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (1000 * width,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values, packed = raw.view(dtype), random_packed(1000)
    compressed = taskloom.masked_compress(values, packed)
    mask = taskloom.unpack_mask(packed, (1000,))
    assert_same_bits(compressed.view(torch.uint8), raw.view(1000, width)[mask].reshape(-1))
    assert_same_bits(taskloom.masked_restore(compressed, packed, values), values)


def test_other_dtypes_move_too() -> None:
    for dtype in (torch.bool, torch.int16, torch.int64, torch.complex64, torch.float8_e4m3fn):
        values = torch.arange(3).to(torch.float32).to(dtype)
        assert torch.equal(taskloom.masked_compress(values, BITS).to(torch.complex64), values.to(torch.complex64)[[0, 2]])


def test_awkward_values() -> None:
    packed = taskloom.pack_mask(torch.ones(13, dtype=torch.bool))
    assert_same_bits(taskloom.masked_compress(awkward(), packed), awkward())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1), BITS, torch.zeros(3)), ValueError, "masked_restore: compressed: expected 2 elements, .*, got 1"),
        ((torch.zeros(3), BITS, torch.zeros(3)), ValueError, "masked_restore: compressed: expected 2 elements, .*, got 3"),
        ((torch.zeros(2), BITS, torch.zeros(9)), ValueError, r"masked_restore: packed: expected shape \(2,\)"),
        ((torch.zeros(2, 1), BITS, torch.zeros(3)), ValueError, "masked_restore: compressed: expected one dimension"),
        (
            (torch.zeros(2), BITS, torch.zeros(3, dtype=torch.int32)),
            TypeError,
            "compressed: expected torch.int32 as base",
        ),
        ((torch.zeros(2), BITS, torch.zeros(3, dtype=torch.complex128)), TypeError, "base: expected elements of at most 8 bytes"),
    ],
)
def test_restore_errors(backend: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=message):
        taskloom.masked_restore(*arguments)


def test_compress_errors() -> None:
    with pytest.raises(ValueError, match=r"masked_compress: packed: expected shape \(2,\)"):
        taskloom.masked_compress(torch.zeros(9), BITS)
    with pytest.raises(TypeError, match=r"masked_compress: packed: expected torch.uint8"):
        taskloom.masked_compress(torch.zeros(3), BITS.bool())


def test_gradients() -> None:
    values = weights(3, 5, dtype=torch.float64).requires_grad_()
    packed = random_packed(15)
    length = taskloom.masked_compress(values, packed).numel()
    compressed = weights(length, dtype=torch.float64, seed=1).requires_grad_()
    with taskloom.backend("native"):
        for function, inputs in (
            (lambda one: taskloom.masked_compress(one, packed), (values,)),
            (lambda one, base: taskloom.masked_restore(one, packed, base), (compressed, values)),
        ):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


def test_gradient_takes_the_compressed_dtype() -> None:
    compressed = torch.ones(2, dtype=torch.float16, requires_grad=True)
    taskloom.masked_restore(compressed, BITS, torch.zeros(3)).sum().backward()
    assert compressed.grad is not None
    assert compressed.grad.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms() -> None:
    values, tangent, packed = weights(20), weights(20, seed=1), random_packed(20)
    mask = taskloom.unpack_mask(packed, (20,))
    compressed, derivative = torch.func.jvp(lambda one: taskloom.masked_compress(one, packed), (values,), (tangent,))
    assert torch.equal(compressed, values[mask])
    assert torch.equal(derivative, tangent[mask])
    _, derivative = torch.func.jvp(lambda one: taskloom.masked_restore(one, packed, values), (compressed,), (tangent[mask],))
    assert torch.equal(derivative, torch.where(mask, tangent, 0))
    many = torch.stack([values, tangent])
    assert torch.equal(
        torch.func.vmap(lambda one: taskloom.masked_restore(compressed, packed, one))(many)[:, mask], compressed.expand(2, -1)
    )


def test_compiled() -> None:
    def both(values: torch.Tensor, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        compressed = 2 * taskloom.masked_compress(values, packed)
        return compressed, taskloom.masked_restore(compressed, packed, values)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compiled(both)
        for size in (20, 44):
            for got, expected in zip(run(weights(size), random_packed(size)), both(weights(size), random_packed(size)), strict=True):
                assert torch.equal(got, expected)


def test_exported() -> None:
    class Compress(torch.nn.Module):
        def forward(self, values: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
            return taskloom.masked_compress(values, packed)

    program = torch.export.export(Compress(), (weights(40), random_packed(40)))
    for density in (0.1, 0.9):
        packed = random_packed(40, density=density)
        assert torch.equal(program.module()(weights(40), packed), taskloom.masked_compress(weights(40), packed))
