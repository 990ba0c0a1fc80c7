"""Routed residual blocks of ADM-like U-Nets. The paper's code for U-Nets is not public: where the mask goes here is inferred from DiT's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taskloom.methods.channels.dtr.dit import Routing, inside
from taskloom.methods.channels.dtr.routing import RandomRouting
from taskloom.methods.channels.dtr.scope import timesteps_of
from taskloom.ops import window_group_norm_silu, window_norm_conv2d

RESIDUAL_PARTS = ("in_layers", "emb_layers", "out_layers", "skip_connection")
ATTENTION_PARTS = ("norm", "qkv", "attention", "proj_out")


def group_norm(place: str, norm: Any) -> nn.GroupNorm:
    """The norm, or TypeError where it is none that has weights."""
    if not isinstance(norm, nn.GroupNorm) or not norm.affine:
        raise TypeError(f"{place}: expected nn.GroupNorm with weights, got {norm}")
    return norm


def residual_norm(place: str, block: Any) -> nn.GroupNorm:
    """The first norm of an ADM ResBlock, or TypeError where the block is made of something else."""
    layers = list(block.in_layers)
    if len(layers) != 3 or not isinstance(layers[1], nn.SiLU) or not hasattr(block, "use_scale_shift_norm"):
        raise TypeError(f"{place}: expected in_layers of GroupNorm, SiLU and a convolution, and use_scale_shift_norm, got {layers}")
    return group_norm(f"{place}.in_layers.0", layers[0])


def _plain(conv: nn.Module) -> bool:
    """Whether a convolution is one that ``window_norm_conv2d`` knows."""
    return type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _first_half(parts: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Norm, SiLU, resampling and convolution of the channels that are seen; and the input at the output's size."""
    norm, act, conv = parts.in_layers
    window, resampled = parts.window, getattr(parts, "updown", False)
    if isinstance(window, RandomRouting):
        h = act(norm(x * window(t)[..., None, None]))
    else:
        start, width = window(t)
        settings = {"groups": norm.num_groups, "start": start, "width": width, "eps": norm.eps}
        if not resampled and _plain(conv):
            shape = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
            return window_norm_conv2d(x, norm.weight, norm.bias, conv.weight, conv.bias, **settings, **shape), x
        h = window_group_norm_silu(x, norm.weight, norm.bias, **settings)
    if resampled:
        h, x = parts.h_upd(h), parts.x_upd(x)
    return conv(h), x


def _added(block: nn.Module, x: Tensor, emb: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a block adds, and its input, both at the output's size."""
    parts: Any = block
    h, x = _first_half(parts, x, t)
    emb = parts.emb_layers(emb).to(h.dtype)[..., None, None]
    if not parts.use_scale_shift_norm:
        return parts.out_layers(h + emb), x
    scale, shift = emb.chunk(2, dim=1)
    h = torch.addcmul(shift, parts.out_layers[0](h), 1 + scale)
    return parts.out_layers[1:](h), x


def _residual(block: nn.Module, x: Tensor, emb: Tensor, t: Tensor) -> Tensor:
    added, x = _added(block, x, emb, t)
    parts: Any = block
    y: Tensor = parts.skip_connection(x) + added
    return y


def routed_residual_members(base: type[nn.Module]) -> dict[str, Any]:
    """What makes an ADM ResBlock with a ``window`` a routed one."""

    def forward(self: nn.Module, x: Tensor, emb: Tensor, t: Tensor | None = None) -> Tensor:
        t = timesteps_of(self, t, len(x))
        if getattr(self, "use_checkpoint", False) and torch.is_grad_enabled():
            y: Tensor = checkpoint(_residual, self, x, emb, t, use_reentrant=False)
            return y
        return _residual(self, x, emb, t)

    return {"forward": forward}


def routed_attention_members(base: type[nn.Module]) -> dict[str, Any]:
    """What makes an ADM AttentionBlock with a ``window`` a routed one."""

    def forward(self: Any, x: Tensor, t: Tensor | None = None) -> Tensor:
        window, t = self.window, timesteps_of(self, t, len(x))
        if isinstance(window, RandomRouting):
            seen = window(t)
        else:
            start, width = window(t)
            seen = inside(start, width, window.channels)
        flat = x.flatten(2)
        y: Tensor = flat + self.proj_out(self.attention(self.qkv(self.norm(flat * seen.unsqueeze(2)))))
        return y.view(x.shape)

    return {"forward": forward}


class RoutedResBlock(nn.Module):
    """An ADM residual block whose branch sees only the channels of the sample's timestep: ``skip(x) + branch(m x, emb)``.

    The branch is GroupNorm, SiLU, 3x3 convolution, the embedding, GroupNorm, SiLU, dropout, 3x3 convolution; m is applied before the first
    norm, whose statistics are over all channels of a group; the skip connection is not masked.

    Parameters
    ----------
    channels, emb_channels
        Of the input and of the timestep's embedding.
    window
        For ``channels`` channels, as in :class:`RoutedDiTBlock`.
    out_channels
        Default: ``channels``. Where they differ the skip connection is a 1x1 convolution.
    groups
        Of both norms. Default 32.
    dropout
        Default 0.
    use_scale_shift_norm
        Whether the embedding scales and shifts the second norm, as in ADM, or is added before it. Default True.
    updown
        ``"up"``: nearest neighbours, twice the size; ``"down"``: mean of 2 x 2, half the size. Default None.

    Notes
    -----
    Source: the block is that of Diffusion Models Beat GANs, arXiv 2105.05233, with the names of openai/guided-diffusion. Where DTR
    (arXiv 2310.07138) masks it is not public, and inferred from the DiT code.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        *,
        window: Routing,
        out_channels: int | None = None,
        groups: int = 32,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = True,
        updown: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        out = channels if out_channels is None else out_channels
        if window.channels != channels:
            raise ValueError(f"RoutedResBlock: window: expected one of {channels} channels, got {window.channels}")
        if updown not in (None, "up", "down"):
            raise ValueError(f"RoutedResBlock: updown: expected 'up', 'down' or None, got {updown!r}")
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out if use_scale_shift_norm else out))
        last = nn.Conv2d(out, out, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, out), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)
        self.updown = updown is not None
        if updown is not None:
            self.h_upd, self.x_upd = (nn.Upsample(scale_factor=2) if updown == "up" else nn.AvgPool2d(2) for _ in range(2))
        self.window = window

    def forward(self, x: Tensor, emb: Tensor, t: Tensor) -> Tensor:
        """Images [N, channels, H, W], embeddings [N, emb_channels] and timesteps, integers [N], to [N, out_channels, H', W'].

        Raises
        ------
        TypeError, IndexError
            If ``t`` holds no integers, or one outside the window's tasks (looked at on a CPU).
        ValueError
            If ``t`` has another shape.
        """
        return _residual(self, x, emb, timesteps_of(self, t, len(x)))
