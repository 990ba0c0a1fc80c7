"""The linearised model with transformers, fused and foreign operations, autocast, torch.compile and DistributedDataParallel."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from taskloom.merge import TaskVector
from taskloom.methods.merging.tangent_arithmetic import EditedModel, LinearizedModel, ntk_matrix


def _vector(model: nn.Module, scale: float = 0.05) -> TaskVector:
    generator = torch.Generator().manual_seed(1)
    deltas = {name: scale * torch.randn(one.shape, generator=generator) for name, one in model.named_parameters()}
    return TaskVector.from_deltas(deltas, regime="linear")


def _bert(attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        attn_implementation=attention,
    )
    model: nn.Module = transformers.BertForMaskedLM(config)
    return model


def _sentences() -> dict[str, Tensor]:
    ids = torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [5], [3]])).long()}


def test_bert_under_the_math_backend() -> None:
    """Tied embeddings, dropout, a mask, keyword arguments, an output that is transformers' own class."""
    model, batch = _bert().train(), _sentences()
    linear = LinearizedModel(model)
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(**batch)
            assert torch.equal(linear(**batch).logits, expected.logits)
        weights = torch.randn(3, 7, 30, generator=torch.Generator().manual_seed(3))
        outputs = linear(**batch)
        assert type(outputs) is type(expected)
        (outputs.logits * weights).sum().backward()
        reference = copy.deepcopy(model).eval()
        (reference(**batch).logits * weights).sum().backward()
    for name, parameter in reference.named_parameters():
        tau = linear.params.get_parameter(name)
        assert (tau.grad is None) == (parameter.grad is None)
        if tau.grad is not None:
            torch.testing.assert_close(tau.grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_attention_without_a_derivative_is_named_with_the_way_out() -> None:
    message = (
        r"_scaled_dot_product_flash_attention_for_cpu has no forward-mode derivative; select the math attention backend: .*sdpa_kernel"
    )
    with pytest.raises(RuntimeError, match=message):
        LinearizedModel(_bert())(**_sentences())
    assert torch.isfinite(LinearizedModel(_bert("eager"))(**_sentences()).logits).all()


@pytest.fixture
def no_fused_layers() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def _layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def test_a_fused_layer_is_named_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match=r"_transformer_encoder_layer_fwd has no forward-mode .*mha\.set_fastpath_enabled\(False\)"):
        LinearizedModel(_layer())(torch.randn(2, 3, 8))


def test_attention_of_torch(no_fused_layers: None) -> None:
    layer, x = _layer(), torch.randn(2, 3, 8)
    linear = LinearizedModel(layer)
    with sdpa_kernel(SDPBackend.MATH):
        # Torch rounds otherwise where the weights require a gradient, also without one.
        assert torch.equal(linear(x), copy.deepcopy(layer).eval().requires_grad_(False)(x))
        gaps = []
        for step in (2e-2, 1e-2):
            vector = step * _vector(layer, 1.0)
            edited = copy.deepcopy(linear).apply_task_vector_(vector)
            gaps.append(float((vector.as_regime("nonlinear").apply_to(layer).eval()(x) - edited(x)).detach().norm()))
    assert 3 < gaps[0] / gaps[1] < 5


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


class Scaler(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(3, 2), function

    def forward(self, x: Tensor) -> Any:
        return self.function.apply(self.linear(x))


@pytest.mark.parametrize("function", [Doubled, Halved])
def test_a_function_of_ones_own_without_a_derivative_is_named(function: type[torch.autograd.Function]) -> None:
    with pytest.raises(RuntimeError, match=rf"{function.__name__} in Scaler has no forward-mode derivative; give .* setup_context and jvp"):
        LinearizedModel(nn.Sequential(Scaler(function)))(torch.randn(4, 3))


@pytest.fixture
def cube() -> Iterator[Callable[[Tensor], Tensor]]:
    """An operation with a gradient but without a forward-mode derivative, of which torch says nothing."""

    def keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def gradient(ctx: Any, grad: Tensor) -> Tensor:
        product: Tensor = 3 * ctx.saved_tensors[0] ** 2 * grad
        return product

    with torch.library._scoped_library("taskloom_tangent_test", "DEF") as library:
        library.define("cube(Tensor x) -> Tensor")
        library.impl("cube", lambda x: x**3, "CPU")
        torch.library.register_autograd("taskloom_tangent_test::cube", gradient, setup_context=keep, lib=library)
        yield lambda x: torch.ops.taskloom_tangent_test.cube(x)


class Residual(nn.Module):
    """A linear layer and a function of it."""

    def __init__(self, function: Callable[[Tensor], Tensor], keep: bool) -> None:
        super().__init__()
        self.linear, self.function, self.keep = nn.Linear(3, 3), function, keep

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.function(y) + y if self.keep else self.function(y)


@pytest.mark.parametrize("keep", [False, True])
def test_a_silent_zero_is_found(keep: bool, cube: Callable[[Tensor], Tensor]) -> None:
    linear, x = LinearizedModel(Residual(cube, keep)), torch.randn(6, 3)
    linear(x)
    with pytest.raises(RuntimeError, match=r"check_derivatives: forward mode has .* where reverse mode has"):
        linear.check_derivatives(x)
    LinearizedModel(Residual(lambda y: y**3, keep)).check_derivatives(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_right_derivatives_pass(dtype: torch.dtype) -> None:
    linear = LinearizedModel(_small().to(dtype))
    with torch.no_grad():
        linear.check_derivatives(torch.randn(6, 4, dtype=dtype))
    with pytest.raises(RuntimeError, match="no output depends on a parameter"):
        LinearizedModel(Residual(torch.Tensor.detach, False).to(dtype)).check_derivatives(torch.randn(6, 3, dtype=dtype))
    with sdpa_kernel(SDPBackend.MATH):
        LinearizedModel(_bert()).check_derivatives(**_sentences())


def test_a_recurrent_layer_without_a_derivative_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"mkldnn_rnn_layer has no forward-mode derivative; replace it"):
        LinearizedModel(nn.LSTM(3, 2))(torch.randn(4, 1, 3))


def test_other_errors_are_the_models_own() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        LinearizedModel(nn.Linear(3, 2))(torch.randn(4, 5))


def _small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 3))


def test_autocast() -> None:
    model, x = _small(), torch.randn(6, 4)
    linear = LinearizedModel(model).apply_task_vector_(_vector(model))
    exact = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = linear(x)
        assert torch.equal(LinearizedModel(model)(x), copy.deepcopy(model).eval()(x))
        outputs.float().sum().backward()
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), exact, rtol=3e-2, atol=3e-2)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in linear.parameters())


def test_inference_mode_and_gradients_of_inputs() -> None:
    model, x = _small(), torch.randn(6, 4, requires_grad=True)
    linear = LinearizedModel(model).apply_task_vector_(_vector(model))
    with torch.no_grad():
        expected = linear(x)
    with torch.inference_mode():
        assert torch.equal(linear(x.detach()), expected)
        built = LinearizedModel(model).apply_task_vector_(_vector(model))
        assert torch.equal(built(x.detach()), expected)
    built(x.detach()).sum().backward()
    linear(x).sum().backward()
    assert x.grad is not None
    moved = linear((x + 1e-3 * x.grad).detach()).sum() - linear(x.detach()).sum()
    assert float(moved.detach()) == pytest.approx(1e-3 * float(x.grad.square().sum()), rel=0.05)


def _steps(forward: Callable[[Tensor], Tensor], linear: LinearizedModel) -> list[Tensor]:
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=0.1)
    linear.decay_whole_weights(optimizer)
    x, y = (torch.randn(8, size, generator=torch.Generator().manual_seed(size)) for size in (4, 3))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(forward(x), y).backward()
        optimizer.step()
    vector = linear.task_vector()
    return [vector[name] for name in vector.names]


def test_compiled_training_is_the_same() -> None:
    model = _small()
    plain, compiled = LinearizedModel(model), LinearizedModel(model)
    expected = _steps(plain, plain)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = _steps(torch.compile(compiled, backend="aot_eager", fullgraph=True), compiled)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_distributed_training_is_the_same(tmp_path: Path) -> None:
    model = _small()
    plain, linear = LinearizedModel(model), LinearizedModel(model)
    expected = _steps(plain, plain)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        got = _steps(DistributedDataParallel(linear), linear)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def _of_two(rank: int, folder: str) -> None:
    """One of two processes: half of the batch, and its result in a file; the models start apart."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = _small()
    if rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    linear = LinearizedModel(model)
    forward = DistributedDataParallel(linear)
    x, y = (torch.randn(8, size, generator=torch.Generator().manual_seed(size)).chunk(2)[rank] for size in (4, 3))
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(forward(x), y).backward()
        optimizer.step()
    torch.save(linear.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    linear = LinearizedModel(_small())
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    x, y = (torch.randn(8, size, generator=torch.Generator().manual_seed(size)) for size in (4, 3))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(linear(x), y).backward()
        optimizer.step()
    for name, value in linear.state_dict().items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value)


class Listed(nn.Module):
    """A layer whose weight is used from a list of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)
        self.weights = [self.second.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.weights[0].T + self.second.bias


def test_a_weight_that_is_used_past_its_name_is_found() -> None:
    model, x = Listed(), torch.randn(6, 3)
    linear = LinearizedModel(model)
    with pytest.warns(UserWarning, match=r"no output depends on second\.weight; a tensor that the model uses past its parameter's name"):
        linear.check_derivatives(x)
    with pytest.warns(UserWarning, match=r"ntk_matrix: no output depends on second\.weight; a tensor that the model uses past"):
        ntk_matrix(model, x)
    model.second.weight.requires_grad_(False)
    LinearizedModel(model).check_derivatives(x)
    ntk_matrix(model, x)
    vector = _vector(model).as_regime("nonlinear")
    assert torch.equal(EditedModel(model)(vector, x, 0), vector.apply_to(model)(x))


def test_linear_vectors_are_not_added_to_ordinary_modules() -> None:
    model = _small()
    vector, before = _vector(model), copy.deepcopy(model.state_dict())
    for add in (vector.apply_to, vector.apply_to_):
        with pytest.raises(
            ValueError, match=r"apply_to_?: expected a nonlinear task vector for an ordinary model, got a linear one.*as_regime"
        ):
            add(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = vector.apply_to(model.state_dict())
    expected = vector.as_regime("nonlinear").apply_to(model).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in changed.items())
