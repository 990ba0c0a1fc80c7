"""Whether a function's forward-mode derivative agrees with its reverse-mode one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from taskloom.methods.merging.tangent_arithmetic.forward_mode import expand

_BOUNDS = {torch.bfloat16: 5e-2, torch.float16: 2e-2}


def _directions(bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random direction, of the size of the weights themselves so that half precision holds it."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, base in bases.items():
        drawn = torch.randn(base.shape, generator=generator).to(base.device, base.dtype)
        size = float(base.float().square().mean().sqrt()) if base.numel() else 0.0
        found[name] = drawn * (size or 1.0)
    return found


def _inner(left: Sequence[Tensor | None], right: Sequence[Tensor]) -> float:
    return sum(float((one.double() * other.double()).sum()) for one, other in zip(left, right, strict=True) if one is not None)


def _cotangents(changes: Sequence[Tensor]) -> list[Tensor]:
    """The changes themselves, which make the products large, and random numbers, which see changes that are wrongly zero."""
    generator, found = torch.Generator().manual_seed(1), []
    for change in changes:
        drawn = torch.randn(change.shape, generator=generator).to(change.device, change.dtype)
        size = float(change.float().square().mean().sqrt()) if change.numel() else 0.0
        found.append(change + drawn * (size or 1.0))
    return found


def check_derivatives(function: Callable[[Mapping[str, Tensor]], Any], bases: dict[str, Tensor], trained: Collection[str]) -> None:
    """Raise RuntimeError unless ``<g, J u>`` by forward mode is ``<J^T g, u>`` by reverse mode; g and u are random.

    Warns of trained parameters that no output depends on.
    """
    directions = _directions(bases)
    with torch.no_grad():
        changes = expand(function, bases, directions).changes
    cotangents = _cotangents(changes)
    with torch.enable_grad():
        leaves = {name: base.detach().requires_grad_() for name, base in bases.items()}
        outputs = [leaf for leaf in tree_leaves(function(leaves)) if leaf is not None]
        reached = [place for place, output in enumerate(outputs) if output.requires_grad]
        if not reached:
            raise RuntimeError("LinearizedModel: check_derivatives: no output depends on a parameter by autograd")
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            [outputs[place] for place in reached], list(leaves.values()), [cotangents[place] for place in reached], allow_unused=True
        )
    forward, reverse = _inner(cotangents, changes), _inner(gradients, list(directions.values()))
    bound = max(_BOUNDS.get(tensor.dtype, 1e-3) for tensor in (*bases.values(), *outputs))
    if not abs(forward - reverse) <= bound * max(abs(forward), abs(reverse)):
        raise RuntimeError(
            f"LinearizedModel: check_derivatives: forward mode has {forward:.6g} where reverse mode has {reverse:.6g}; an operation of the "
            "model has no forward-mode derivative and says nothing (one registered with torch.library), or one that is wrong"
        )
    unused = [name for name, gradient in zip(bases, gradients, strict=True) if gradient is None and name in trained]
    if unused:
        some = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        warnings.warn(
            f"LinearizedModel: check_derivatives: no output depends on {some}; a tensor that the model uses past its parameter's name "
            "counts as constant",
            stacklevel=3,
        )
