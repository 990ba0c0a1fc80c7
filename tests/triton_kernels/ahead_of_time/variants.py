"""Every variant of every kernel that the contracts' cases launch: types of arguments and constants, found without launching."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import taskloom
from taskloom.ops import _backends
from taskloom.triton_kernels import gating, lowrank, masked, routed

OPS = Path(__file__).parents[2] / "ops"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LARGE = 1 << 31


@dataclass(frozen=True)
class Variant:
    """What Triton compiles: a kernel for types of its arguments, some known to be multiples of 16, and constants."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    multiples: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def _type_of(value: Tensor | int) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "i32" if -LARGE <= value < LARGE else "i64"


class _Launches:
    """Stands in for ``launch`` and notes what would be compiled."""

    def __init__(self) -> None:
        self.variants: dict[Variant, None] = {}
        self.enlarged: set[Any] = set()

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        assert {*named, *constants} == set(kernel.arg_names)
        self._note(kernel, named, constants, num_warps)
        if named.get("numel", 1) > 1 and kernel not in self.enlarged:
            self.enlarged.add(kernel)
            self._note(kernel, named | {"numel": LARGE}, constants, num_warps)

    def _note(self, kernel: Any, named: dict[str, Any], constants: dict[str, Any], num_warps: int) -> None:
        # As Triton does: an argument that is 1 is a constant, and multiples of 16 are known to be such.
        ones = {name: 1 for name, value in named.items() if not isinstance(value, Tensor) and value == 1}
        types = tuple((name, _type_of(value)) for name, value in named.items() if name not in ones)
        multiples = tuple(name for name, value in named.items() if isinstance(value, Tensor) or (value % 16 == 0 and name != "numel"))
        self.variants[Variant(kernel, types, multiples, tuple((constants | ones).items()), num_warps)] = None


def _set_entries(packed: Tensor, numel: int, block: int) -> tuple[Tensor, int]:
    return torch.zeros(1, dtype=torch.int64), int(taskloom.reference.masked.unpack_mask(packed, (numel,)).sum())


def kernel_modules() -> list[ModuleType]:
    """The modules of every family."""
    return [
        importlib.import_module(f"{family.__name__}.{found.name}")
        for family in (masked, lowrank, routed, gating)
        for found in pkgutil.iter_modules(family.__path__)
    ]


def variants() -> Iterator[Variant]:
    """The variants, in the order of the contracts."""
    launches = _Launches()
    contracts = [contract for path in sorted(OPS.glob("cases_*.py")) for contract in importlib.import_module(path.stem).CONTRACTS]
    cases = [(contract, case) for contract in contracts for case in contract.cases()]
    with ExitStack() as stack:
        for module in kernel_modules():
            if hasattr(module, "launch"):
                stack.enter_context(patch.object(module, "launch", launches))
        compress = importlib.import_module(f"{masked.__name__}.masked_compress")
        original = compress._places
        stack.enter_context(patch.object(compress, "_places", lambda *size: (original(*size), _set_entries(*size))[1]))
        step = importlib.import_module(f"{masked.__name__}.masked_step")
        stack.enter_context(patch.object(step._Group, "check_counts", lambda group, found: None))
        stack.enter_context(patch.object(_backends, "triton_obstacle", lambda device: None))
        # Nothing is launched, so what kernels would have written must be something.
        stack.enter_context(patch.object(torch, "empty", torch.zeros))
        stack.enter_context(taskloom.backend("triton"))
        for contract, case in cases:
            contract.run(case)
    yield from launches.variants
