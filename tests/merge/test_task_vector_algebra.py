"""The algebra of task vectors against the same expressions in float64, for any expression, dtypes and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from taskloom import TaskVector

DTYPES = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float64: 2.0**-53}
SHAPES = {"matrix": (5, 7), "scalar": (), "empty": (3, 0), "row": (1, 33)}
NUMBERS = st.floats(-4, 4, allow_nan=False).map(lambda number: round(number, 3))


def _deltas(seed: int, dtypes: list[torch.dtype]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=True)}


@dataclass
class Expression:
    """An expression's vector, its values in float64, and the size of the numbers that were added on the way."""

    vector: TaskVector
    values: dict[str, Tensor]
    sizes: dict[str, Tensor]


def _leaf(seed: int, dtypes: list[torch.dtype]) -> Expression:
    deltas = _deltas(seed, dtypes)
    wide = {name: delta.double() for name, delta in deltas.items()}
    return Expression(TaskVector.from_deltas(deltas), wide, {name: delta.abs() for name, delta in wide.items()})


def _sum(left: Expression, right: Expression, sign: int) -> Expression:
    vector = left.vector + right.vector if sign > 0 else left.vector - right.vector
    return Expression(
        vector,
        {name: left.values[name] + sign * right.values[name] for name in SHAPES},
        {name: left.sizes[name] + right.sizes[name] for name in SHAPES},
    )


def _multiple(one: Expression, factor: float, left: bool) -> Expression:
    vector = factor * one.vector if left else one.vector * factor
    return Expression(
        vector,
        {name: factor * one.values[name] for name in SHAPES},
        {name: abs(factor) * one.sizes[name] for name in SHAPES},
    )


def _negative(one: Expression) -> Expression:
    return Expression(-one.vector, {name: -one.values[name] for name in SHAPES}, one.sizes)


LEAVES = st.builds(_leaf, st.integers(0, 5), st.lists(st.sampled_from(list(DTYPES)), min_size=4, max_size=4))
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(_sum, inner, inner, st.sampled_from([1, -1])) | st.builds(_multiple, inner, NUMBERS, st.booleans()) | inner.map(_negative)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(EXPRESSIONS)
def test_expressions_are_what_float64_says(expression: Expression) -> None:
    vector = expression.vector
    for name, delta in vector.items():
        assert tuple(delta.shape) == SHAPES[name]
        assert delta.dtype == vector.dtypes[name]
        # Some roundings in float32, and one to the vector's dtype.
        allowed = 12 * 2.0**-24 * expression.sizes[name] + 2 * DTYPES[delta.dtype] * expression.values[name].abs() + 1e-7
        assert bool(((delta.double() - expression.values[name]).abs() <= allowed).all()), name
    same = vector.materialize()
    assert all(torch.equal(same[name], delta) for name, delta in vector.items())
    assert same.norm() == vector.norm()


def _alike(got: Tensor, expected: Tensor) -> bool:
    """Equal but for an ulp, which coefficients that cancel only nearly may leave."""
    ulp = 2 * DTYPES[expected.dtype]
    return bool(((got - expected).double().abs() <= ulp * expected.double().abs() + 4 * ulp).all())


@settings(max_examples=25, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS, NUMBERS)
def test_laws(one: Expression, two: Expression, factor: float) -> None:
    a, b = one.vector, two.vector

    def same(left: TaskVector, right: TaskVector) -> bool:
        return all(torch.equal(left[name], right[name]) for name in SHAPES)

    negated = -a
    assert same(-negated, a)
    assert same(a - b, a + -b)
    back = a + b - b
    for name in SHAPES:
        # Where a wider vector was in the sum, it is computed wider.
        if back.dtypes[name] == a.dtypes[name]:
            assert _alike(back[name], a[name])
    assert same(factor * a, a * factor)
    assert not any(bool(delta.any()) for delta in (a - a).values())
    assert a.dot(b) == b.dot(a)
    flat = [torch.cat([vector[name].double().flatten() for name in SHAPES]).numpy() for vector in (a, b)]
    size = float(np.abs(flat[0]) @ np.abs(flat[1]))
    assert a.dot(b) == pytest.approx(float(flat[0] @ flat[1]), abs=1e-13 * size + 1e-300)
    assert a.norm() == pytest.approx(float(np.linalg.norm(flat[0])), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(list(DTYPES)), min_size=12, max_size=12), NUMBERS, NUMBERS)
def test_files_give_what_memory_gives(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[torch.dtype], left: float, right: float
) -> None:
    folder: Path = tmp_path_factory.mktemp("vectors")
    states = [_deltas(seed, dtypes[4 * seed : 4 * seed + 4]) for seed in range(3)]
    for number, state in enumerate(states):
        save_file(state, folder / f"{number}.safetensors")
    base, *tuned = [folder / f"{number}.safetensors" for number in range(3)]
    on_disk = [TaskVector.from_checkpoints(base, path) for path in tuned]
    in_memory = [TaskVector(states[0], state) for state in states[1:]]
    mixed, expected = (left * pair[0] + right * pair[1] for pair in (on_disk, in_memory))
    for name in SHAPES:
        assert mixed.dtypes[name] == expected.dtypes[name]
        assert torch.equal(mixed[name], expected[name])
    assert mixed.dot(on_disk[0]) == expected.dot(in_memory[0])
    made, wanted = mixed.apply_to(states[1], 0.3), expected.apply_to(states[1], 0.3)
    assert all(torch.equal(made[name], wanted[name]) for name in SHAPES)
