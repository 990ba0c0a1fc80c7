"""A linear map that sees a window of each sample's channels, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.routed.windows import out_mask, window_mask


def window_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None = None,
    out_start: Tensor | None = None,
    out_width: int = 0,
    out_widths: Tensor | None = None,
) -> Tensor:
    """Y = (m x) weight^T + bias where the output's window is, 0 elsewhere, rounded once to x's dtype.

    x [N, P, C], weight [O, C], bias [O]; m [N, C] is 1 in each sample's window and 0 outside, whatever x holds there.
    """
    dtype = accumulation_dtype(x, weight, bias)
    seen = window_mask(len(x), x.shape[2], start, width, widths)[:, None]
    made = out_mask(len(x), len(weight), out_start, out_width, out_widths, x)[:, None]
    y = x.to(dtype).masked_fill(~seen, 0) @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return y.masked_fill(~made, 0).to(x.dtype)


def window_linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias, of each where ``needed`` says so; x's is 0 outside the windows."""
    dtype = accumulation_dtype(gradient, x, weight)
    outside = ~window_mask(len(x), x.shape[2], start, width, widths)[:, None]
    made = out_mask(len(x), len(weight), out_start, out_width, out_widths, x)[:, None]
    back = gradient.to(dtype).masked_fill(~made, 0)
    rows = x.to(dtype).masked_fill(outside, 0)
    found: list[Tensor] = []
    if needed[0]:
        found.append((back @ weight.to(dtype)).masked_fill(outside, 0).to(x.dtype))
    if needed[1]:
        found.append((back.reshape(-1, len(weight)).T @ rows.reshape(-1, x.shape[2])).to(weight.dtype))
    if needed[2]:
        found.append(back.sum((0, 1)).to(weight.dtype))
    return found
