"""Checks of what shared bases hold at each position."""

from __future__ import annotations

from torch import Tensor

from taskloom.ops._checks import FLOATING, check_floating


def check_positions(op: str, mean: Tensor, basis: Tensor, coefficients: Tensor, names: tuple[str, str, str]) -> None:
    """Raise unless mean is [P, r], basis [P, p, r] and coefficients [..., P, p], of floating dtypes."""
    tensors = (mean, basis, coefficients)
    for name, tensor in zip(names, tensors, strict=True):
        if not (isinstance(tensor, Tensor) and tensor.dtype in FLOATING):
            check_floating(op, name, tensor)
    if mean.dim() != 2:
        raise ValueError(f"{op}: {names[0]}: expected shape [P, r], got {tuple(mean.shape)}")
    positions, width = mean.shape
    if basis.dim() != 3 or basis.shape[0] != positions or basis.shape[2] != width:
        raise ValueError(f"{op}: {names[1]}: expected shape [{positions}, p, {width}] as {names[0]}, got {tuple(basis.shape)}")
    if coefficients.shape[-2:] != basis.shape[:2]:
        raise ValueError(
            f"{op}: {names[2]}: expected last dimensions {tuple(basis.shape[:2])} as {names[1]}, got {tuple(coefficients.shape)}"
        )
