"""Layers that see a window of each sample's channels, with the parameters of torch's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from taskloom.ops import window_conv2d, window_linear


class WindowLinear(nn.Linear):
    """``nn.Linear`` of a masked input, whose masked channels take no work: the parameters and the ``state_dict`` are ``nn.Linear``'s.

    Attributes
    ----------
    takes_window
        True: :class:`RoutedResidual` gives such a layer the window in place of a masked input.
    """

    takes_window = True

    def forward(  # type: ignore[override]  # The window is what the layer is for.
        self,
        x: Tensor,
        start: Tensor | int,
        width: Tensor | int,
        out_start: Tensor | int | None = None,
        out_width: Tensor | int | None = None,
    ) -> Tensor:
        """The outputs ``[N, ..., out]`` of x ``[N, ..., in]``; windows as :func:`taskloom.window_linear` takes them."""
        return window_linear(x, self.weight, self.bias, start=start, width=width, out_start=out_start, out_width=out_width)


class WindowConv2d(nn.Conv2d):
    """``nn.Conv2d`` of a masked input, whose masked channels take no work: the parameters and the ``state_dict`` are ``nn.Conv2d``'s.

    Parameters
    ----------
    *args, **kwargs
        As of ``nn.Conv2d``; ``groups`` must be 1, ``padding_mode`` ``"zeros"``, and ``padding`` numbers.

    Raises
    ------
    ValueError
        If they are not.

    Attributes
    ----------
    takes_window
        True: :class:`RoutedResidual` gives such a layer the window in place of a masked input.
    """

    takes_window = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, wanted in (("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != wanted:
                raise ValueError(f"WindowConv2d: {name}: expected {wanted!r}, got {getattr(self, name)!r}")
        if isinstance(self.padding, str):
            raise ValueError(f"WindowConv2d: padding: expected a number or two, got {self.padding!r}")

    def forward(  # type: ignore[override]  # The window is what the layer is for.
        self,
        x: Tensor,
        start: Tensor | int,
        width: Tensor | int,
        out_start: Tensor | int | None = None,
        out_width: Tensor | int | None = None,
    ) -> Tensor:
        """The outputs ``[N, out, H', W']`` of x ``[N, in, H, W]``; windows as :func:`taskloom.window_conv2d` takes them."""
        geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        out: dict[str, Any] = {"out_start": out_start, "out_width": out_width}
        return window_conv2d(x, self.weight, self.bias, start=start, width=width, **geometry, **out)
