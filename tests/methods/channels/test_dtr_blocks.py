"""DTR: routed DiT blocks against the masked block of the official code, and models that are converted in place."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from taskloom.methods.channels.dtr import Diffusion, RandomRouting, RoutedDiT, RoutedDiTBlock, convert_dit, dtr_starts, dtr_window
from taskloom.methods.channels.dtr.routing import Formula
from taskloom.methods.threads import one_thread

C, HEADS, TASKS = 20, 4, 40


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    with one_thread():
        yield


class TimmAttention(nn.Module):
    """As timm's, in a few words."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, p, width = x.shape
        q, k, v = self.qkv(x).reshape(n, p, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.mT / (width // self.num_heads) ** 0.5, -1)
        return self.proj((scores @ v).transpose(1, 2).reshape(n, p, width))


class TimmMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """The block of facebookresearch/DiT; with ``mask`` [N, C] that of DTR's official code."""

    def __init__(self, width: int = C, heads: int = HEADS) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = TimmAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = TimmMlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        m = torch.ones_like(x[:, :1]) if mask is None else mask[:, None].to(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        z = x * m
        z = z + gate1[:, None] * self.attn(_modulated(self.norm1(z), shift1, scale1))
        z = z + gate2[:, None] * self.mlp(_modulated(self.norm2(z), shift2, scale2))
        return z + x * (1 - m)


class Embedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(torch.sin(t[:, None] * torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=self.mlp[0].weight.dtype)))


class DiT(nn.Module):
    """In the manner of facebookresearch/DiT: blocks are not told the timesteps, and guidance calls ``self.forward``."""

    def __init__(self, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.t_embedder = Embedder(C)
        self.y_embedder = nn.Embedding(3, C)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return x

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        with_label, without = self.forward(x, t, y).chunk(2)
        return without + scale * (with_label - without)


def _masked_forward(model: DiT, x: Tensor, t: Tensor, y: Tensor, masks: Tensor) -> Tensor:
    c = model.t_embedder(t) + model.y_embedder(y)
    for block in model.blocks:
        x = block(x, c, masks[t])
    return x


def _masks(beta: float = 0.6, formula: Formula = "code", channels: int = C) -> Tensor:
    start, width = dtr_starts(TASKS, channels, beta, 4.0, formula)
    place = torch.arange(channels)
    return (place >= start[:, None]) & (place < (start + width)[:, None])


def _inputs(batch: int = 5, tokens: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, c = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((batch, tokens, C), (batch, C)))
    return x, c, torch.tensor([0, TASKS - 1, 31, 36, TASKS - 1])[:batch]


def _pair(window: Any, dtype: torch.dtype = torch.float64) -> tuple[RoutedDiTBlock, Block]:
    torch.manual_seed(0)
    block, routed = Block().to(dtype), RoutedDiTBlock(C, HEADS, window=window).to(dtype)
    routed.load_state_dict(block.state_dict(), strict=not isinstance(window, RandomRouting))
    return routed, block


def _gradients(call: Any, module: nn.Module, x: Tensor, c: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x, c = (one.clone().requires_grad_() for one in (x, c))
    y = call(x, c)
    module.zero_grad()
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
    assert x.grad is not None
    assert c.grad is not None
    own = {name: one.grad.clone() for name, one in module.named_parameters() if one.grad is not None}
    return y.detach(), {**own, "x": x.grad, "c": c.grad}


def _window(formula: Formula = "code", beta: float = 0.6) -> nn.Module:
    return dtr_window(TASKS, C, beta, 4.0, formula)


@pytest.mark.parametrize("beta", [0.3, 0.6])
@pytest.mark.parametrize("formula", ["code", "paper"])
def test_block_is_the_official_one(formula: str, beta: float) -> None:
    """Narrow windows are cut out of the product with qkv, others are not."""
    routed, block = _pair(_window(formula, beta))
    x, c, t = _inputs()
    masks = _masks(beta, formula)
    y, found = _gradients(lambda x, c: routed(x, c, t), routed, x, c)
    expected, gradients = _gradients(lambda x, c: block(x, c, masks[t]), block, x, c)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("beta", [0.3, 0.6])
def test_channels_that_no_sample_sees_still_train_qkv(beta: float) -> None:
    routed, block = _pair(_window(beta=beta))
    x, c, _ = _inputs()
    t = torch.zeros(5, dtype=torch.int64)
    masks = _masks(beta)
    _, found = _gradients(lambda x, c: routed(x, c, t), routed, x, c)
    _, gradients = _gradients(lambda x, c: block(x, c, masks[t]), block, x, c)
    columns = found["attn.qkv.weight"][:, ~masks[0]]
    assert columns.abs().amin() > 0
    torch.testing.assert_close(columns, gradients["attn.qkv.weight"][:, ~masks[0]], atol=1e-10, rtol=1e-10)


def test_gradients_pass_unseen_channels_unchanged() -> None:
    routed, _ = _pair(_window())
    x, c, t = _inputs()
    x.requires_grad_()
    y = routed(x, c, t)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    seen = _masks()[t][:, None].expand_as(x)
    assert torch.equal(dx[~seen], dy[~seen])
    assert not torch.equal(dx[seen], dy[seen])


@pytest.mark.parametrize("beta", [0.3, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_in_lower_precision(dtype: torch.dtype, beta: float) -> None:
    routed, block = _pair(_window(beta=beta), dtype)
    x, c, t = _inputs(dtype=dtype)
    y, expected = routed(x, c, t), block.double()(x.double(), c.double(), _masks(beta)[t])
    assert y.dtype == dtype
    assert (y.double() - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("beta", [0.3, 0.6])
def test_block_under_autocast(beta: float) -> None:
    routed, block = _pair(_window(beta=beta), torch.float32)
    x, c, t = _inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = routed(x, c, t)
    expected = block(x, c, _masks(beta)[t])
    assert y.dtype == torch.float32
    assert 1e-5 < (y - expected).norm() / expected.norm() < 1e-2


def test_random_routing_is_the_masked_block() -> None:
    routed, block = _pair(RandomRouting(TASKS, C, 0.6, torch.Generator().manual_seed(3)))
    x, c, t = _inputs()
    y, found = _gradients(lambda x, c: routed(x, c, t), routed, x, c)
    expected, gradients = _gradients(lambda x, c: block(x, c, routed.window(t)), block, x, c)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10)
    assert "window.mask" in routed.state_dict()


def test_no_routing_at_beta_one() -> None:
    routed, block = _pair(_window(beta=1.0))
    x, c, t = _inputs()
    torch.testing.assert_close(routed(x, c, t), block(x, c), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.6])
def test_samples_do_not_depend_on_each_other(beta: float) -> None:
    routed, _ = _pair(_window(beta=beta))
    x, c, t = _inputs()
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(routed(x[order], c[order], t[order]), routed(x, c, t)[order], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.6])
def test_backward_repeats_bit_by_bit(beta: float) -> None:
    routed, _ = _pair(_window(beta=beta), torch.float32)
    x, c, t = _inputs(dtype=torch.float32)
    first, second = (_gradients(lambda x, c: routed(x, c, t), routed, x, c) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def _kept_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the storages that a forward keeps for its backward."""
    kept: dict[int, int] = {}
    tensors = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


@pytest.mark.parametrize("beta", [0.3, 0.6])
def test_no_more_is_kept_for_the_backward_than_without_routing(beta: float) -> None:
    routed, block = _pair(_window(beta=beta), torch.float32)
    for part in ("attn", "mlp"):
        setattr(block, part, getattr(routed, part))
    x, c, t = _inputs(tokens=64, dtype=torch.float32)
    x.requires_grad_()
    assert _kept_bytes(lambda: routed(x, c, t)) < _kept_bytes(lambda: block(x, c))


@pytest.mark.parametrize("beta", [0.3, 0.6])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 7), (3, 0)])
def test_empty_batches(batch: int, tokens: int, beta: float) -> None:
    routed, _ = _pair(_window(beta=beta))
    x, c, t = _inputs(batch, tokens)
    assert routed(x, c, t).shape == (batch, tokens, C)


def test_bad_blocks() -> None:
    with pytest.raises(ValueError, match="window: expected one of 20 channels, got 24"):
        RoutedDiTBlock(C, HEADS, window=dtr_window(TASKS, 24, 0.6))
    with pytest.raises(ValueError, match="heads: expected a divisor of hidden, 20, got 3"):
        RoutedDiTBlock(C, 3, window=_window())
    routed, _ = _pair(_window())
    x, c, t = _inputs()
    with pytest.raises(RuntimeError, match=r"RoutedDiTBlock: t: expected the timesteps, integers \[N\], got none"):
        routed(x, c)
    with pytest.raises(IndexError):
        routed(x, c, t + TASKS)
    with pytest.raises(TypeError):
        routed(x, c, t.double())
    with pytest.raises(TypeError, match="RoutedDiTBlock: t: expected a tensor of integers, got int"):
        routed(x, c, 3)
    for wrong in (t[0], t[:1], t[:, None]):
        with pytest.raises(ValueError, match=r"RoutedDiTBlock: t: expected shape \(5,\), one for each sample, got"):
            routed(x, c, wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.3, 0.6])
def test_block_on_a_gpu(beta: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    routed, block = _pair(_window(beta=beta), torch.float32)
    routed.cuda()
    x, c, t = _inputs(dtype=torch.float32)
    _, found = _gradients(lambda x, c: routed(x, c, t.cuda()), routed, x.cuda(), c.cuda())
    _, expected = _gradients(lambda x, c: block(x, c, _masks(beta)[t].to(x.dtype)), block.double(), x.double(), c.double())
    for name, gradient in expected.items():
        assert (found[name].cpu() - gradient).norm() / gradient.norm() < 1e-5, name


def _converted(depth: int = 2) -> tuple[DiT, DiT]:
    plain = DiT(depth).double()
    return convert_dit(copy.deepcopy(plain), beta=0.6, num_tasks=TASKS), plain


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    x, _, t = _inputs()
    return x, t, torch.tensor([0, 1, 2, 0, 1])


def test_converted_models_are_routed() -> None:
    model, plain = _converted()
    x, t, y = _batch()
    expected = _masked_forward(plain, x, t, y, _masks())
    torch.testing.assert_close(model(x, t, y), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(model(x, y=y, t=t), expected, atol=1e-10, rtol=1e-10)
    assert (plain(x, t, y) - expected).abs().max() > 1e-3


def test_conversion_is_in_place() -> None:
    model = DiT()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    model.blocks[1].eval()
    assert convert_dit(model, num_tasks=TASKS) is model
    assert isinstance(model, DiT)
    assert list(model.state_dict()) == keys
    assert all(one is parameters[name] for name, one in model.named_parameters())
    assert len(dict(model.named_parameters())) == len(parameters)
    assert [block.training for block in model.blocks] == [True, False]
    model.load_state_dict(DiT(seed=5).state_dict())


def test_guidance_calls_forward_by_itself() -> None:
    model, plain = _converted()
    x, t, y = (one[:4] for one in _batch())
    with_label, without = _masked_forward(plain, x, t, y, _masks()).chunk(2)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 1.5), without + 1.5 * (with_label - without), atol=1e-10, rtol=1e-10)


def test_copies_are_routed_by_themselves() -> None:
    model, _ = _converted()
    x, t, y = _batch()
    expected = model(x, t, y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        torch.testing.assert_close(twin(x, t, y), expected, atol=0, rtol=0)
        with torch.no_grad():
            twin.blocks[0].attn.proj.weight.zero_()
        torch.testing.assert_close(model(x, t, y), expected, atol=0, rtol=0)

        # The twin's blocks must not listen to the model that they were copied from.
        def inside(module: nn.Module, arguments: tuple[Tensor, Tensor], block: nn.Module = twin.blocks[0]) -> None:
            with pytest.raises(RuntimeError, match="outside its model's forward"):
                block(*arguments)

        with model.blocks[0].register_forward_pre_hook(inside):
            model(x, t, y)


def test_threads_have_timesteps_of_their_own() -> None:
    model, _ = _converted()
    x, t, y = _batch()
    late = (t + 7) % TASKS
    expected = {0: model(x, t, y), 1: model(x, late, y)}
    barrier = threading.Barrier(2, timeout=60)

    # Both threads are between the model's forward and each block's at the same time.
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, arguments: (barrier.wait(), None)[1])
    found: dict[int, Tensor] = {}

    def work(place: int) -> None:
        found[place] = model(x, (t, late)[place], y)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    for place in range(2):
        torch.testing.assert_close(found[place], expected[place], atol=1e-10, rtol=1e-10)


def test_timesteps_are_forgotten_after_a_call() -> None:
    model, _ = _converted()
    x, t, y = _batch()
    model(x, t, y)
    with pytest.raises(RuntimeError, match="called without timesteps outside its model's forward"):
        model.blocks[0](x, model.y_embedder(y))
    with pytest.raises(IndexError):
        model(x, t + TASKS, y)
    with pytest.raises(RuntimeError, match="called without timesteps"):
        model.blocks[0](x, model.y_embedder(y))


def test_checkpointed_blocks_take_timesteps_as_an_argument() -> None:
    model, plain = _converted(1)
    x, t, y = _batch()
    c = model.t_embedder(t) + model.y_embedder(y)
    found = torch.utils.checkpoint.checkpoint(model.blocks[0], x, c, t, use_reentrant=False)
    found.sum().backward()
    _masked_forward(plain, x, t, y, _masks()).sum().backward()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, plain.blocks[0].attn.qkv.weight.grad, atol=1e-10, rtol=1e-10)


def test_converted_models_compile() -> None:
    model, _ = _converted()
    x, t, y = _batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for moved in (t, t.flip(0)):
        torch.testing.assert_close(compiled(x, moved, y), model(x, moved, y), atol=1e-12, rtol=1e-12)


class Strange(nn.Module):
    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return x


def _with_blocks(*blocks: nn.Module) -> DiT:
    model = DiT()
    model.blocks = nn.ModuleList(blocks)
    return model


def _with_norm() -> nn.Module:
    block = Block()
    block.norm2 = nn.LayerNorm(C)
    return block


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Strange(), TypeError, "model: expected a forward with the argument 't', Strange's has x, step"),
        (_with_blocks(), TypeError, "model: expected a ModuleList 'blocks', DiT has none with a block in it"),
        (_with_blocks(Block(), nn.Linear(2, 2)), TypeError, "model: blocks.1: expected a block of norm1, attn"),
        (_with_blocks(_with_norm()), TypeError, "model: blocks.0: norm2: expected nn.LayerNorm over the channels without weights"),
    ],
)
def test_models_of_another_kind_stay_as_they_are(model: nn.Module, error: type[Exception], message: str) -> None:
    before = list(model.modules())
    with pytest.raises(error, match=message):
        convert_dit(model)
    assert all(one is other for one, other in zip(model.modules(), before, strict=True))


def test_bad_conversions() -> None:
    model = DiT()
    blocks = list(model.blocks)
    with pytest.raises(ValueError, match="beta"):
        convert_dit(model, beta=0.0)
    assert list(model.blocks) == blocks
    convert_dit(model)
    with pytest.raises(ValueError, match="convert_dit: model: DiT is routed already"):
        convert_dit(model)


def _tiny(routings: list[Any]) -> RoutedDiT:
    torch.manual_seed(0)
    model = RoutedDiT(routings, input_size=8, in_channels=2, hidden_size=C, num_heads=HEADS, num_classes=3, class_dropout_prob=0.5)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_model_starts_at_zero_and_predicts_an_image() -> None:
    x, t, y = torch.randn(3, 2, 8, 8), torch.tensor([0, 5, 39]), torch.tensor([0, 3, 1])
    fresh = RoutedDiT([_window()], input_size=8, in_channels=2, hidden_size=C, num_heads=HEADS, num_classes=3)
    assert not fresh.eval()(x, t, y).any()
    y_hat = _tiny([_window()] * 2)(x, t, y)
    assert y_hat.shape == x.shape
    assert y_hat.std() > 0


def test_patches_go_back_where_they_came_from() -> None:
    """With blocks that add nothing, a token's pixels depend on that token's patch only."""
    model = _tiny([])
    x, t, y = torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.tensor([1])
    moved = x.clone()
    moved[0, :, 2:4, 4:6] += 1
    changed = (model(moved, t, y) - model(x, t, y)).abs().amin((0, 1)) > 1e-6
    assert changed.nonzero().tolist() == [[row, column] for row in (2, 3) for column in (4, 5)]


def test_labels_are_dropped_in_training_only() -> None:
    model = _tiny([_window()])
    x, t = torch.randn(1, 2, 8, 8).expand(64, -1, -1, -1), torch.zeros(64, dtype=torch.int64)
    y = torch.zeros(64, dtype=torch.int64)
    assert len(model(x, t, y).flatten(1).unique(dim=0)) == 1
    dropped = model.train()(x, t, y).flatten(1)
    without = model.eval()(x[:1], t[:1], torch.tensor([3])).flatten(1)
    close = [(row - without).abs().max() < 1e-5 for row in dropped]
    assert 10 < sum(close) < 54


def test_samplers_of_any_length_have_the_same_windows() -> None:
    window = dtr_window(TASKS, C, 0.6)
    model = _tiny([window])
    seen: dict[int, tuple[Any, ...]] = {}

    def remember(module: nn.Module, arguments: tuple[Tensor], output: tuple[Any, ...]) -> None:
        start, width = output
        key = int(arguments[0][0])
        now = (start.flatten()[0].item(), torch.as_tensor(width).flatten()[0].item())
        assert seen.setdefault(key, now) == now

    y = torch.tensor([0, 1])
    start, width = dtr_starts(TASKS, C, 0.6)
    with window.register_forward_hook(remember):
        for steps in (4, 14, 40):
            Diffusion("cosine", TASKS).sample(lambda x, t: model(x, t, y), torch.randn(2, 2, 8, 8), steps)
    assert seen == {t: (int(start[t]), int(width[t])) for t in range(TASKS)}


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="patch_size: expected a divisor of input_size, 9, got 2"):
        RoutedDiT([], input_size=9, hidden_size=C, num_heads=HEADS)
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of 4, got 18"):
        RoutedDiT([], hidden_size=18, num_heads=2)


def test_parts_are_those_of_timm() -> None:
    routed, block = _pair(_window(beta=1.0))
    x, _, _ = _inputs()
    torch.testing.assert_close(routed.attn(x), block.attn(x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(routed.mlp(x), block.mlp(x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(routed.mlp.act(x), functional.gelu(x, approximate="tanh"))
