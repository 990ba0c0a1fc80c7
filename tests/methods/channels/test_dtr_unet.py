"""DTR in U-Nets: routed residual blocks against the masked blocks of ADM, and models that are converted in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from taskloom.methods.channels.dtr import RandomRouting, RoutedResBlock, convert_adm, dtr_starts, dtr_window
from taskloom.methods.channels.dtr.routing import Formula
from taskloom.methods.threads import one_thread

TASKS, EMB, GROUPS = 40, 6, 4


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    with one_thread():
        yield


class TimestepBlock(nn.Module):
    """What openai/guided-diffusion gives an embedding to."""


class ResBlock(TimestepBlock):
    """The residual block of openai/guided-diffusion; ``mask`` [N, C] goes before the branch and not before the skip connection."""

    def __init__(self, channels: int, out: int, scale_shift: bool = True, updown: str | None = None) -> None:
        super().__init__()
        self.use_scale_shift_norm, self.updown, self.use_checkpoint = scale_shift, updown is not None, False
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMB, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)
        if updown:
            self.h_upd, self.x_upd = (nn.Upsample(scale_factor=2) if updown == "up" else nn.AvgPool2d(2) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None = None) -> Tensor:
        h = x if mask is None else x * mask[:, :, None, None]
        h = functional.silu(self.in_layers[0](h))
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = self.in_layers[2](h)
        e = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + e)
        return self.skip_connection(x) + self.out_layers[3](functional.silu(h))


class AttentionBlock(nn.Module):
    """That of openai/guided-diffusion, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(GROUPS, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.attention, self.proj_out = Attention(), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        flat = x.flatten(2)
        h = flat if mask is None else flat * mask[:, :, None]
        return (flat + self.proj_out(self.attention(self.qkv(self.norm(h))))).view(x.shape)


class Attention(nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, 1)
        return v @ torch.softmax(q.mT @ k / q.shape[1] ** 0.5, -1).mT


class UNet(nn.Module):
    """Down, attention, up, with a skip connection; blocks are chosen by their class, as in openai/guided-diffusion."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time_embed = nn.Linear(1, EMB)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.layers = nn.ModuleList([ResBlock(8, 12, updown="down"), AttentionBlock(12), ResBlock(12, 8, False, "up")])
        self.last = ResBlock(16, 8)

    def forward(self, x: Tensor, timesteps: Tensor, masks: dict[int, Tensor] | None = None, attention: bool = False) -> Tensor:
        def mask(channels: int, routed: bool = True) -> tuple[Tensor, ...]:
            return (masks[channels][timesteps],) if masks and routed else ()

        emb = self.time_embed(timesteps[:, None].to(x.dtype))
        h = skip = self.first(x)
        for layer in self.layers:
            h = layer(h, emb, *mask(h.shape[1])) if isinstance(layer, TimestepBlock) else layer(h, *mask(h.shape[1], attention))
        return self.last(torch.cat([h, skip], 1), emb, *mask(16))


def _masks(channels: int, beta: float = 0.6, formula: Formula = "code") -> Tensor:
    start, width = dtr_starts(TASKS, channels, beta, 4.0, formula)
    place = torch.arange(channels)
    return ((place >= start[:, None]) & (place < (start + width)[:, None])).double()


def _inputs(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, emb = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, channels, 6, 4), (4, EMB)))
    return x, emb, torch.tensor([0, TASKS - 1, 33, 36])


def _gradients(call: Any, module: nn.Module, x: Tensor, emb: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x, emb = (one.clone().requires_grad_() for one in (x, emb))
    y = call(x, emb)
    module.zero_grad()
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    assert x.grad is not None
    assert emb.grad is not None
    own = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    return y.detach(), {**own, "x": x.grad, "emb": emb.grad}


@pytest.mark.parametrize("routing", ["code", "narrow", "paper", "random"])
@pytest.mark.parametrize(("out", "scale_shift", "updown"), [(12, True, None), (12, False, "down"), (8, True, "up"), (8, False, None)])
def test_block_is_the_masked_one(out: int, scale_shift: bool, updown: Any, routing: str) -> None:
    random, beta = routing == "random", 0.2 if routing == "narrow" else 0.6
    formula: Formula = "paper" if routing == "paper" else "code"
    window: Any = RandomRouting(TASKS, 12, beta) if random else dtr_window(TASKS, 12, beta, 4.0, formula)
    masks = window.mask.double() if random else _masks(12, beta, formula)
    torch.manual_seed(0)
    block = ResBlock(12, out, scale_shift, updown).double()
    routed = RoutedResBlock(
        12, EMB, window=window, out_channels=out, groups=GROUPS, use_scale_shift_norm=scale_shift, updown=updown
    ).double()
    assert not routed.out_layers[-1].weight.any()
    routed.load_state_dict(block.state_dict(), strict=not random)
    x, emb, t = _inputs(12)
    y, found = _gradients(lambda x, emb: routed(x, emb, t), routed, x, emb)
    expected, gradients = _gradients(lambda x, emb: block(x, emb, masks[t]), block, x, emb)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    if out == 12 and updown is None:
        dy = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
        unseen = (masks[t] == 0)[:, :, None, None].expand_as(x)
        assert torch.equal(found["x"][unseen], dy[unseen])


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_converted_models_are_routed(attention: bool, checkpointed: bool) -> None:
    plain = UNet().double()
    model = copy.deepcopy(plain)
    keys = list(model.state_dict())
    assert convert_adm(model, beta=0.6, num_tasks=TASKS, route_attention=attention) is model
    assert list(model.state_dict()) == keys
    assert isinstance(model.last, TimestepBlock)
    for block in model.modules():
        if hasattr(block, "use_checkpoint"):
            block.use_checkpoint = checkpointed
    x, t = _inputs(1)[0], _inputs(1)[2]
    masks = {channels: _masks(channels) for channels in (8, 12, 16)}
    y, expected = model(x, t), plain(x, t, masks, attention)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    assert (plain(x, t) - expected).abs().max() > 1e-3
    y.sum().backward()
    expected.sum().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, timesteps=t), model(x, t))


@pytest.mark.parametrize("attention", [False, True])
def test_conversion_with_random_channels(attention: bool) -> None:
    plain = UNet().double()
    generator = torch.Generator().manual_seed(3)
    model = convert_adm(
        copy.deepcopy(plain), route_attention=attention, routing=lambda channels: RandomRouting(TASKS, channels, 0.6, generator)
    )
    x, t = _inputs(1)[0], _inputs(1)[2]
    masks = {block.window.channels: block.window.mask.double() for block in model.modules() if hasattr(block, "window")}
    # The attention and the block before the last have 12 channels each, and masks of their own.
    layers = model.layers
    emb = plain.time_embed(t[:, None].to(x.dtype))
    h = skip = plain.first(x)
    h = plain.layers[0](h, emb, layers[0].window.mask[t].double())
    h = plain.layers[1](h, layers[1].window.mask[t].double() if attention else None)
    h = plain.layers[2](h, emb, layers[2].window.mask[t].double())
    expected = plain.last(torch.cat([h, skip], 1), emb, masks[16][t])
    torch.testing.assert_close(model(x, t), expected, atol=1e-10, rtol=1e-10)
    assert sum(key.endswith("window.mask") for key in model.state_dict()) == 3 + attention
    with pytest.raises(ValueError, match="convert_adm: routing: expected one of 8 channels, got 12"):
        convert_adm(plain, routing=lambda channels: RandomRouting(TASKS, 12))
    assert not any(hasattr(block, "window") for block in plain.modules())


class Renamed(UNet):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t)


def _with_norm(norm: nn.Module) -> UNet:
    model = UNet()
    model.last.in_layers[0] = norm
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Renamed(), "convert_adm: model: expected a forward with the argument 'timesteps', Renamed's has x, t"),
        (_with_norm(nn.GroupNorm(4, 16, affine=False)), r"model: last.in_layers.0: expected nn.GroupNorm with weights"),
        (_with_norm(nn.BatchNorm2d(16)), r"model: last.in_layers.0: expected nn.GroupNorm with weights"),
    ],
)
def test_models_of_another_kind_stay_as_they_are(model: nn.Module, message: str) -> None:
    classes = [type(one) for one in model.modules()]
    with pytest.raises(TypeError, match=message):
        convert_adm(model)
    assert [type(one) for one in model.modules()] == classes


def test_bad_blocks() -> None:
    with pytest.raises(ValueError, match="window: expected one of 12 channels, got 8"):
        RoutedResBlock(12, EMB, window=dtr_window(TASKS, 8, 0.6), groups=GROUPS)
    with pytest.raises(ValueError, match="updown: expected 'up', 'down' or None, got 'left'"):
        RoutedResBlock(12, EMB, window=dtr_window(TASKS, 12, 0.6), groups=GROUPS, updown="left")
    routed = RoutedResBlock(12, EMB, window=dtr_window(TASKS, 12), groups=GROUPS).double()
    x, emb, t = _inputs(12)
    with pytest.raises(ValueError, match=r"RoutedResBlock: t: expected shape \(4,\), one for each sample, got \(\)"):
        routed(x, emb, t[0])
    model = UNet()
    convert_adm(model)
    with pytest.raises(ValueError, match="model: UNet is routed already"):
        convert_adm(model)
    with pytest.raises(RuntimeError, match="called without timesteps"):
        model.last(*_inputs(16)[:2])
