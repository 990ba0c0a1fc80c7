"""The first-order Taylor expansion of a model in its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map


def taylor(
    run: Callable[[Sequence[Tensor], tuple[Any, ...], dict[str, Any]], Any],
    base: Sequence[Tensor],
    tangents: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``run`` at the base's weights plus its derivative along the tangents, for each tensor that it returns."""

    def outputs_of(*weights: Tensor) -> Any:
        return run(weights, args, kwargs)

    # The fused attention kernels have no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        pair: tuple[Any, ...] = torch.func.jvp(outputs_of, tuple(base), tuple(tangents))
    return tree_map(torch.add, *pair)
