"""DTR on the DiT of facebookresearch/DiT: names, state dicts, values, and the lines of code of the page."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from facebook_dit import DiTBlock, FacebookDiT, sincos_2d
from pages import code_blocks
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from taskloom.methods.channels.dtr import RandomRouting, RoutedDiT, convert_dit, dtr_starts, dtr_window
from taskloom.methods.channels.dtr.routing import Formula
from taskloom.methods.threads import one_thread

C, TASKS = 24, 40
PAGE = Path(__file__).parents[3] / "docs" / "methods" / "dtr.md"


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    with one_thread():
        yield


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, torch.tensor([0, TASKS - 1, 33, 36]), torch.tensor([0, 3, 1, 2])


def _masks(beta: float, formula: Formula = "code") -> Tensor:
    start, width = dtr_starts(TASKS, C, beta, 4.0, formula)
    place = torch.arange(C)
    return ((place >= start[:, None]) & (place < (start + width)[:, None])).double()


def _routed_by_hand(model: FacebookDiT, x: Tensor, t: Tensor, y: Tensor, masks: list[Tensor]) -> Tensor:
    """The model's forward with the block of the card: a mask before the first norm, none on the identity, none on what is written."""

    def norm(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(z, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y, False)
    for block, table in zip(model.blocks, masks, strict=True):
        m = table[t][:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, 1)
        z = m * tokens
        z = z + gate1[:, None] * block.attn(norm(z, shift1, scale1))
        z = z + gate2[:, None] * block.mlp(norm(z, shift2, scale2))
        tokens = z + (1 - m) * tokens
    return model.unpatchify(model.final_layer(tokens, c))


@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_conversion_routes_the_model_and_keeps_its_state_dict(beta: float) -> None:
    plain = FacebookDiT().double().eval()
    model = convert_dit(copy.deepcopy(plain), beta=beta, num_tasks=TASKS)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(inspect.signature(model.forward).parameters) == ["x", "t", "y"]
    x, t, y = _inputs()
    expected = _routed_by_hand(plain, x, t, y, [_masks(beta)] * 2)
    torch.testing.assert_close(model(x, t, y), expected, atol=1e-10, rtol=1e-10)
    assert (plain(x, t, y) - expected).abs().max() > 1e-2
    saved = io.BytesIO()
    torch.save(plain.state_dict(), saved)
    saved.seek(0)
    fresh = FacebookDiT().double().eval()
    torch.nn.init.zeros_(fresh.x_embedder.proj.weight)
    convert_dit(fresh, beta=beta, num_tasks=TASKS).load_state_dict(torch.load(saved))
    torch.testing.assert_close(fresh(x, t, y), expected, atol=1e-10, rtol=1e-10)
    plain.load_state_dict(model.state_dict())
    guided = model.forward_with_cfg(x, t[:1].expand(4), y, 1.5)
    twice = torch.cat([x[:2], x[:2]])
    cond, uncond = _routed_by_hand(plain, twice, t[:1].expand(4), y, [_masks(beta)] * 2)[:, :3].chunk(2)
    torch.testing.assert_close(guided[:2, :3], uncond + 1.5 * (cond - uncond), atol=1e-10, rtol=1e-10)


def test_conversion_with_the_papers_formula_and_with_random_channels() -> None:
    plain = FacebookDiT().double().eval()
    x, t, y = _inputs()
    paper = convert_dit(copy.deepcopy(plain), routing=lambda channels: dtr_window(TASKS, channels, 0.6, formula="paper"))
    expected = _routed_by_hand(plain, x, t, y, [_masks(0.6, "paper")] * 2)
    torch.testing.assert_close(paper(x, t, y), expected, atol=1e-10, rtol=1e-10)
    generator = torch.Generator().manual_seed(5)
    random = convert_dit(copy.deepcopy(plain), routing=lambda channels: RandomRouting(TASKS, channels, 0.6, generator))
    masks = [block.window.mask.double() for block in random.blocks]
    assert not torch.equal(*masks)
    torch.testing.assert_close(random(x, t, y), _routed_by_hand(plain, x, t, y, masks), atol=1e-10, rtol=1e-10)
    assert set(random.state_dict()) - set(plain.state_dict()) == {"blocks.0.window.mask", "blocks.1.window.mask"}
    before = list(plain.blocks)
    with pytest.raises(ValueError, match="RoutedDiTBlock: window: expected one of 24 channels, got 20"):
        convert_dit(plain, routing=lambda channels: dtr_window(TASKS, 20))
    assert list(plain.blocks) == before


def test_windows_are_made_where_the_blocks_are() -> None:
    model = convert_dit(FacebookDiT().to("meta").eval(), num_tasks=TASKS)
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    x, t, y = (one.to("meta") for one in _inputs(torch.float32))
    assert model(x, t, y).shape == (4, 6, 4, 4)


class WithGain(DiTBlock):
    """A block that does more than DiT's, with the same parts."""

    def __init__(self) -> None:
        super().__init__(C, 4)
        self.gain = nn.Parameter(torch.ones(C))


class WithContext(DiTBlock):
    def __init__(self) -> None:
        super().__init__(C, 4)

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
        return super().forward(x + context, c)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (WithGain(), "blocks.1: expected a block without parameters of its own, WithGain has gain"),
        (WithContext(), r"blocks.1: expected a block that is called as block\(x, c\), WithContext's forward needs x, c, context"),
    ],
)
def test_blocks_that_do_more_are_refused(block: nn.Module, message: str) -> None:
    model = FacebookDiT()
    model.blocks[1] = block
    keys = list(model.state_dict())
    with pytest.raises(TypeError, match=message):
        convert_dit(model)
    assert list(model.state_dict()) == keys


def _own(dtype: torch.dtype) -> tuple[RoutedDiT, FacebookDiT]:
    plain = FacebookDiT(learn_sigma=False)
    windows = [dtr_window(TASKS, C, 0.6)] * 2
    own = RoutedDiT(windows, input_size=4, in_channels=3, hidden_size=C, num_heads=4, num_classes=3)
    torch.testing.assert_close(own.pos_embed, plain.pos_embed, atol=1e-6, rtol=0)
    own.load_state_dict(plain.state_dict())
    plain.load_state_dict(own.state_dict())
    return own.to(dtype).eval(), plain.to(dtype).eval()


def test_own_model_takes_its_state_dict() -> None:
    own, plain = _own(torch.float64)
    x, t, y = _inputs()
    expected = _routed_by_hand(plain, x, t, y, [_masks(0.6)] * 2)
    torch.testing.assert_close(own(x, t, y), expected, atol=1e-10, rtol=1e-10)
    wide = RoutedDiT([], input_size=16, in_channels=3, hidden_size=C, num_heads=4)
    assert abs(wide.pos_embed[0].numpy() - sincos_2d(C, 8)).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_are_embedded_in_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    own, plain = _own(torch.float32)
    t = torch.arange(0, 1000, 7)
    exact = own.t_embedder(t)
    torch.testing.assert_close(exact, plain.t_embedder(t), atol=1e-6, rtol=1e-5)
    rough = own.to(dtype).t_embedder(t)
    assert rough.dtype == dtype
    assert (rough.float() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 1, 4, 4), (3, 4, 4)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    own, _ = _own(torch.float32)
    _, t, y = _inputs()
    with pytest.raises(ValueError, match=r"RoutedDiT: x: expected shape \(N, 3, 4, 4\), got"):
        own(torch.zeros(shape), t, y)


def test_lines_of_the_page_train_and_sample() -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [(torch.randn(4, 3, 4, 4, generator=generator), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    built: list[FacebookDiT] = []

    def build(learn_sigma: bool) -> FacebookDiT:
        built.append(FacebookDiT(learn_sigma=learn_sigma))
        return built[-1]

    scope = {
        "torch": torch,
        "DiT_L_2": build,
        "device": "cpu",
        "batches": batches,
        "labels": torch.tensor([2, 1]),
        "noise": torch.randn(2, 3, 4, 4, generator=generator),
    }
    first = FacebookDiT(learn_sigma=False).state_dict()
    (block,) = code_blocks(PAGE)
    exec(compile(block, str(PAGE), "exec"), scope)
    assert scope["images"].shape == (2, 3, 4, 4)
    assert scope["images"].isfinite().all()
    (model,) = built
    assert scope["model"] is model
    assert not torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], first["blocks.0.attn.qkv.weight"])
