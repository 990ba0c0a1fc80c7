"""Linear layers and convolutions that run on a prefix of their channels, at a width that is chosen call by call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taskloom.nn.slim_widths import SlimLayer, Width, active_channels
from taskloom.ops import prefix_conv2d, prefix_linear
from taskloom.ops._checks import cast_layer_for_autocast


def _repr_of_output(slim: bool) -> str:
    return "" if slim else ", slim_output=False"


class SlimLinear(nn.Linear, SlimLayer):
    """A linear layer of which a prefix of the inputs and outputs is active.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As nn.Linear takes them: the whole layer's.
    divisor
        What active outputs are a multiple of where the width is a ratio (:func:`make_divisible`). Default 8.
    slim_output
        Whether outputs follow :func:`use_width`. Default True; False for a layer whose outputs mean something each, such as classes.

    Notes
    -----
    The parameters, their names and initial values are nn.Linear's, so that the state dict is exchanged with it both ways. Source:
    slimmable layers, Yu et al., ICLR 2019, arXiv 1812.08928.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        divisor: int = 8,
        slim_output: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.divisor, self.slim_output = divisor, slim_output

    def active_outputs(self, out_width: Width | None = None) -> int:
        """The outputs of a width; None: of the one that :func:`use_width` says, 1.0 without."""
        if out_width is None:
            out_width = self.width if self.slim_output else 1.0
        return active_channels("SlimLinear: out_width", out_width, self.out_features, self.divisor)

    def forward(self, x: Tensor, out_width: Width | None = None) -> Tensor:
        """``x weight[:out, :in]^T + bias[:out]`` for x ``[..., in]``.

        ``out_width`` is a ratio in (0, 1] or an integer of outputs; default None: what :func:`use_width` says, 1.0 without.
        """
        x, weight, bias = cast_layer_for_autocast(x, self.weight, self.bias)
        return prefix_linear(x, weight, bias, self.active_outputs(out_width))

    def extra_repr(self) -> str:
        """As nn.Linear's, with what is not the default."""
        return f"{super().extra_repr()}{_repr_of_output(self.slim_output)}"


class SlimConv2d(nn.Conv2d, SlimLayer):
    """A convolution of which a prefix of the input and output channels is active.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        As nn.Conv2d takes them: the whole layer's. Groups keep their sizes, and the first of them are active, as many as x has.
    divisor
        What active outputs are a multiple of where the width is a ratio (:func:`make_divisible`). Default 8.
    slim_output
        Whether outputs follow :func:`use_width`. Default True.

    Notes
    -----
    The parameters, their names and initial values are nn.Conv2d's, so that the state dict is exchanged with it both ways. Source:
    slimmable layers, Yu et al., ICLR 2019, arXiv 1812.08928.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        divisor: int = 8,
        slim_output: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device=device, dtype=dtype
        )
        self.divisor, self.slim_output = divisor, slim_output

    def active_outputs(self, out_width: Width | None = None) -> int | None:
        """The output channels of a width; None where they follow the input's groups."""
        if out_width is None:
            if self.groups > 1:
                return None
            out_width = self.width if self.slim_output else 1.0
        return active_channels("SlimConv2d: out_width", out_width, self.out_channels, self.divisor)

    def forward(self, x: Tensor, out_width: Width | None = None) -> Tensor:
        """The convolution of x ``[N, in, H, W]`` with ``weight[:out, :in]``.

        ``out_width`` is a ratio in (0, 1] or an integer of channels; default None: what :func:`use_width` says, 1.0 without. With several
        groups the outputs are those of the groups that x has.
        """
        outputs = self.active_outputs(out_width)
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            if any(self._reversed_padding_repeated_twice):
                x = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        x, weight, bias = cast_layer_for_autocast(x, self.weight, self.bias)
        settings: dict[str, Any] = {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}
        return prefix_conv2d(x, weight, bias, outputs, **settings)

    def extra_repr(self) -> str:
        """As nn.Conv2d's, with what is not the default."""
        layer: Any = super()
        plain = layer.extra_repr()
        return f"{plain}{_repr_of_output(self.slim_output)}"
