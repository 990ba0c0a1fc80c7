"""What holds for every op: its backends agree with the reference, its fake kernel with its real one, on every sample."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import Case, Contract, Recorder, assert_close, assert_same_bits, copied
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils import _pytree as pytree

import taskloom
from taskloom import _native
from taskloom.ops import _library
from taskloom.ops._backends import OPS

CONTRACTS = tuple(
    contract for path in sorted(Path(__file__).parent.glob("cases_*.py")) for contract in importlib.import_module(path.stem).CONTRACTS
)
SAMPLES = [pytest.param(contract, case, id=f"{contract.op}-{case.name}") for contract in CONTRACTS for case in contract.cases()]
samples = pytest.mark.parametrize(("contract", "case"), SAMPLES)


def _calls(contract: Contract, case: Case) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    with taskloom.backend("native"), Recorder() as recorder:
        contract.run(case)
    return recorder.calls


def _to_fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value


def _is_unbacked(size: int | torch.SymInt) -> bool:
    return bool(free_unbacked_symbols(size))


def test_every_op_has_a_contract() -> None:
    assert {contract.op for contract in CONTRACTS} == set(OPS)


def test_every_schema_is_registered() -> None:
    schemas = {name.removeprefix("taskloom::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("taskloom::")}
    assert schemas == set(OPS)


@samples
def test_native_matches_the_reference(contract: Contract, case: Case) -> None:
    with taskloom.backend("native"):
        got = contract.run(case)
    with taskloom.backend("reference"):
        expected = contract.run(case)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)


@samples
def test_fake_matches_real(contract: Contract, case: Case) -> None:
    for op, args, kwargs in _calls(contract, case):
        real = op(*copied(args), **copied(kwargs))
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            to_fake = partial(_to_fake, mode)
            fake = op(*pytree.tree_map(to_fake, args), **pytree.tree_map(to_fake, kwargs))
        for ours, theirs in zip(pytree.tree_leaves(fake), pytree.tree_leaves(real), strict=True):
            if isinstance(theirs, torch.Tensor):
                assert (ours.stride(), ours.dtype) == (theirs.stride(), theirs.dtype)
                assert all(_is_unbacked(size) or size == real for size, real in zip(ours.shape, theirs.shape, strict=True))


@samples
def test_opcheck(contract: Contract, case: Case) -> None:
    for op, args, kwargs in _calls(contract, case):
        # opcheck compares values where it traces, and takes NaN for different from NaN.
        results = [leaf for leaf in pytree.tree_leaves(op(*copied(args), **copied(kwargs))) if isinstance(leaf, torch.Tensor)]
        traced = () if any(result.isnan().any() for result in results) else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *traced))


@samples
@pytest.mark.usefixtures("restored_threads")
def test_threads_do_not_change_a_bit(contract: Contract, case: Case) -> None:
    results = []
    with taskloom.backend("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(contract.run(case))
    same = assert_close if contract.torch_products else assert_same_bits
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            same(first, second)


@samples
@pytest.mark.usefixtures("restored_level")
def test_cpu_levels_do_not_change_a_bit(contract: Contract, case: Case) -> None:
    levels = [level for level in _native.build_info()["levels"] if level <= _native.detected_cpu_level()]
    results = []
    with taskloom.backend("native"):
        for level in levels:
            _library.force_cpu_level(level)
            results.append(contract.run(case))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert_same_bits(first, second)
