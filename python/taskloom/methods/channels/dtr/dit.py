"""DiT with routed blocks: the block, and a class-conditional model with the names of facebookresearch/DiT."""

from __future__ import annotations

import inspect
import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from taskloom.methods.channels.dtr.routing import RandomRouting
from taskloom.methods.channels.dtr.scope import timesteps_of
from taskloom.nn import TaskWindow
from taskloom.ops import window_layer_norm, window_norm_linear
from taskloom.reference.routed.windows import window_mask

Routing = TaskWindow | RandomRouting

_EPS = 1e-6
# Windows of at most this share of the channels are cut out of the product that makes queries, keys and values. On a CPU that then takes 0.7
# to 1.2 times as long as the whole product, forward and backward; at 0.8 of the channels it takes 1.1 to 1.3 times as long.
_NARROW = 0.5
_PARTS = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")


class Attention(nn.Module):
    """Self-attention with timm's names."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"heads: expected a divisor of hidden, {hidden}, got {heads}")
        self.num_heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def attend(self, qkv: Tensor) -> Tensor:
        """The output [N, P, C] of queries, keys and values [N, P, 3 C]."""
        n, p, width = qkv.shape
        q, k, v = qkv.view(n, p, 3, self.num_heads, width // (3 * self.num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(attended.transpose(1, 2).reshape(n, p, width // 3))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, P, C] to tokens."""
        return self.attend(self.qkv(x))


class Mlp(nn.Module):
    """Two layers with GELU (tanh) between them, with timm's names."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, P, C] to tokens."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``, tokens [N, P, C] by conditions [N, C]."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def inside(start: Tensor, width: Tensor | int, channels: int) -> Tensor:
    """Where each sample's window is, bool [N, C]."""
    if isinstance(width, int):
        return window_mask(len(start), channels, start, width, None)
    return window_mask(len(start), channels, start, channels, width)


class RoutedDiTBlock(nn.Module):
    """A DiT block with adaLN-Zero whose added part sees only the channels of the sample's timestep.

    With m the window of timestep t: ``a = gate1 attn(LN(m x) (1 + scale1) + shift1)``, ``z = m x + a``,
    ``b = gate2 mlp(LN(z) (1 + scale2) + shift2)``, output ``x + a + b``. The norms are over all channels. No masked copy of x is made where
    the routing is a :class:`~taskloom.nn.TaskWindow`.

    Parameters
    ----------
    hidden, heads
        C and the number of attention heads.
    mlp_ratio
        The MLP has ``int(hidden * mlp_ratio)`` units. Default 4.
    window
        What :func:`dtr_window` gives, or a :class:`RandomRouting` for the paper's ablation. Both hold no parameters.

    Notes
    -----
    Source: Denoising Task Routing, arXiv 2310.07138, and its official code. Parameters are named as in timm and facebookresearch/DiT.
    """

    def __init__(self, hidden: int, heads: int, mlp_ratio: float = 4.0, *, window: Routing) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, _EPS, elementwise_affine=False)
        self.attn: nn.Module = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden, _EPS, elementwise_affine=False)
        self.mlp: nn.Module = Mlp(hidden, int(hidden * mlp_ratio))
        self.adaLN_modulation: nn.Module = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        self._route(window)

    def _route(self, window: Routing) -> None:
        hidden = self.norm1.normalized_shape[0]
        if window.channels != hidden:
            raise ValueError(f"RoutedDiTBlock: window: expected one of {hidden} channels, got {window.channels}")
        self.window = window

    @staticmethod
    def channels_of(block: nn.Module) -> int:
        """Channels of a DiT block.

        Raises
        ------
        TypeError
            If the block is not made of norm1 and norm2 (LayerNorm without weights), attn, mlp and adaLN_modulation, has parameters or
            buffers beside them, or has to be called with something else than tokens and conditions.
        """
        children = dict(block.named_children())
        if set(children) != set(_PARTS):
            raise TypeError(f"expected a block of {', '.join(_PARTS)}, {type(block).__name__} has {', '.join(children) or 'no parts'}")
        # What this block would not use, and would drop from the state dict.
        own = [name for name, _ in (*block.named_parameters(recurse=False), *block.named_buffers(recurse=False))]
        if own:
            raise TypeError(f"expected a block without parameters of its own, {type(block).__name__} has {', '.join(own)}")
        needed = [name for name, one in inspect.signature(block.forward).parameters.items() if one.default is one.empty]
        if len(needed) != 2:
            raise TypeError(f"expected a block that is called as block(x, c), {type(block).__name__}'s forward needs {', '.join(needed)}")
        channels = 0
        for name in ("norm1", "norm2"):
            norm = children[name]
            if not isinstance(norm, nn.LayerNorm) or norm.elementwise_affine or len(norm.normalized_shape) != 1:
                raise TypeError(f"{name}: expected nn.LayerNorm over the channels without weights, got {norm}")
            channels = norm.normalized_shape[0]
        return channels

    @classmethod
    def from_block(cls, block: nn.Module, window: Routing) -> Self:
        """A routed block that holds the parts of a DiT block, themselves and not copies.

        Raises
        ------
        TypeError
            As :meth:`channels_of`.
        ValueError
            If the window is for another number of channels.
        """
        cls.channels_of(block)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name in _PARTS:
            setattr(made, name, getattr(block, name))
        made._route(window)
        return made.train(block.training)

    def _attended(self, x: Tensor, shift: Tensor, scale: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's output [N, P, C], and where each sample's channels are, bool [N, C]."""
        window, eps = self.window, self.norm1.eps
        if isinstance(window, RandomRouting):
            seen = window(t)
            return self.attn(modulate(self.norm1(x * seen.unsqueeze(1)), shift, scale)), seen
        start, width = window(t)
        seen = inside(start, width, window.channels)
        narrow = isinstance(width, int) and width <= _NARROW * window.channels
        if narrow and isinstance(self.attn, Attention):
            qkv = self.attn.qkv
            return self.attn.attend(window_norm_linear(x, qkv.weight, qkv.bias, shift, scale, start=start, width=width, eps=eps)), seen
        return self.attn(window_layer_norm(x, shift, scale, start=start, width=width, eps=eps)), seen

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        """Tokens to tokens.

        Parameters
        ----------
        x
            [N, P, C].
        c
            Conditions [N, C].
        t
            Timesteps, integers [N]. Default: those of the model's running forward, where :func:`convert_dit` made the block.

        Raises
        ------
        TypeError, IndexError
            If ``t`` holds no integers, or one outside the window's tasks (looked at on a CPU).
        ValueError
            If ``t`` has another shape.
        RuntimeError
            If no timesteps are known.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        attended, seen = self._attended(x, shift1, scale1, timesteps_of(self, t, len(x)))
        first = gate1.unsqueeze(1) * attended
        both = x + first
        z = torch.where(seen.unsqueeze(1), both, first)
        # The norm over all channels is that of a window as wide: one pass over z, which alone is kept for the backward.
        u = window_layer_norm(z, shift2, scale2, start=0, width=self.window.channels, eps=self.norm2.eps)
        return torch.addcmul(both, gate2.unsqueeze(1), self.mlp(u))


class TimestepEmbedder(nn.Module):
    """Sines and cosines of the timesteps, through two layers."""

    def __init__(self, hidden: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        """Embeddings [N, C] of timesteps [N]."""
        half = self.frequencies // 2
        # Made anew, in float32: a buffer would be rounded with a model in half precision, by whole turns of the angles.
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * rates
        embedded: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(next(self.mlp.parameters()).dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """A vector per class, and one for no class where labels are dropped in training."""

    def __init__(self, classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.classes, self.dropout = classes, dropout
        self.embedding_table = nn.Embedding(classes + (dropout > 0), hidden)

    def forward(self, labels: Tensor) -> Tensor:
        """Embeddings [N, C] of labels [N]."""
        if self.training and self.dropout > 0:
            labels = torch.where(torch.rand(labels.shape, device=labels.device) < self.dropout, self.classes, labels)
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class PatchEmbed(nn.Module):
    """Patches of an image as tokens."""

    def __init__(self, patch: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [N, P, C] of images [N, channels, H, W]."""
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).mT


class FinalLayer(nn.Module):
    """The pixels of each token."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, _EPS, elementwise_affine=False)
        self.linear = nn.Linear(hidden, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens [N, P, C] and conditions [N, C] to [N, P, outputs]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        y: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return y


def _positions(hidden: int, side: int) -> Tensor:
    """Sines and cosines of a square grid's columns, then of its rows, [side * side, C]."""
    rates = 10000.0 ** (-torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()


class RoutedDiT(nn.Module):
    """A class-conditional DiT of routed blocks, for square images or latents.

    Parameters
    ----------
    routings
        One per block, see :class:`RoutedDiTBlock`.
    input_size, patch_size
        Side of the images and of a patch.
    in_channels
        Of the images.
    hidden_size, num_heads, mlp_ratio
        Of the blocks.
    num_classes
        Labels are from 0 to below this.
    class_dropout_prob
        How often a label is dropped in training; above 0 there is one more embedding, for no class. Default 0.1.

    Notes
    -----
    Its state dict fits facebookresearch/DiT with ``learn_sigma=False``. Initial weights are torch's own, but for those that make every
    block start as the identity and the output as 0.
    """

    def __init__(
        self,
        routings: list[Routing],
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"RoutedDiT: patch_size: expected a divisor of input_size, {input_size}, got {patch_size}")
        if hidden_size % 4:
            raise ValueError(f"RoutedDiT: hidden_size: expected a multiple of 4, got {hidden_size}")
        self.patch_size, self.in_channels, self.input_size = patch_size, in_channels, input_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = _positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(RoutedDiTBlock(hidden_size, num_heads, mlp_ratio, window=routing) for routing in routings)
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Make every block add nothing, and the output 0."""
        for owner in (*self.blocks, self.final_layer):
            last = owner.adaLN_modulation[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise [N, channels, H, W] of images of that shape, timesteps, integers [N], and labels [N].

        Raises
        ------
        ValueError
            If x has another shape than the model was made for, or there is not one timestep for each sample.
        TypeError, IndexError
            As of :class:`RoutedDiTBlock`; a label that is out of range is an IndexError too.
        """
        size = (self.in_channels, self.input_size, self.input_size)
        if x.shape[1:] != size:
            raise ValueError(f"RoutedDiT: x: expected shape (N, {', '.join(map(str, size))}), got {tuple(x.shape)}")
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c, t)
        pixels: Tensor = self.final_layer(tokens, c)
        n, _, height, width = x.shape
        patch = self.patch_size
        grid = pixels.view(n, height // patch, width // patch, patch, patch, self.in_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
