"""The linearised model: the invariants of its card, its parameters and buffers, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from taskloom.merge import TaskVector
from taskloom.methods.merging.tangent_arithmetic import EditedModel, LinearizedModel, ntk_matrix

F64 = torch.float64


class Network(nn.Module):
    """Convolution, batch norm, dropout, layer norm: everything that has a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.layers = nn.ModuleList([nn.Linear(27, 5), nn.LayerNorm(5), nn.Linear(5, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(functional.gelu(self.norm(self.conv(x)))).flatten(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Tied(nn.Module):
    """An embedding whose table is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.out = nn.Linear(3, 7)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.table(ids)))
        return logits


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor | None


class Structured(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.linear = form, nn.Linear(3, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> object:
        y = torch.tanh(self.linear(x)) * scale
        forms: dict[str, object] = {
            "tuple": (y, y**2),
            "dict": {"logits": y, "hidden": [y**2, None]},
            "named": Pair(y, None),
            "ids": (y, y.argmax(1)),
            "object": object(),
        }
        return forms[self.form]


def _network(dtype: torch.dtype = F64, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = Network().to(dtype)
    with torch.no_grad():
        network(torch.randn(64, 2, 3, 3, dtype=dtype))
    return network


def _inputs(dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(6, 2, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


def _direction(model: nn.Module, seed: int, scale: float = 0.1) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: scale * torch.randn(one.shape, generator=generator, dtype=F64).to(one.dtype) for name, one in model.named_parameters()}
    return TaskVector.from_deltas(deltas, regime="linear")


def _error(got: Tensor, expected: Tensor) -> float:
    return float((torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)).detach())


def _at(model: nn.Module, vector: TaskVector, x: Tensor) -> Tensor:
    """The ordinary model with a vector added to its weights."""
    changed: Tensor = vector.as_regime("nonlinear").apply_to(model).eval()(x)
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_the_base_is_exact(dtype: torch.dtype) -> None:
    """Invariant 1."""
    model, x = _network(torch.float32).to(dtype), _inputs().to(dtype)
    linear = LinearizedModel(model)
    with torch.no_grad():
        assert torch.equal(linear(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (F64, 1e-12)])
def test_changes_add_up(dtype: torch.dtype, bound: float) -> None:
    """Invariant 2."""
    model, x = _network(dtype), _inputs(dtype)
    linear, u, v = LinearizedModel(model), _direction(model, 1), _direction(model, 2)
    base = linear(x)

    def change(vector: TaskVector) -> Tensor:
        edited = copy.deepcopy(linear).apply_task_vector_(vector)
        assert isinstance(edited(x), Tensor)
        difference: Tensor = edited(x) - base
        return difference

    assert _error(change(0.7 * u - 1.3 * v), 0.7 * change(u) - 1.3 * change(v)) <= bound
    assert _error(change(u + v), change(u) + change(v)) <= bound


@torch.no_grad()
def test_the_gap_to_the_model_is_of_second_order() -> None:
    """Invariant 3."""
    model, x = _network(), _inputs()
    linear, u = LinearizedModel(model), _direction(model, 1, scale=1.0)
    at_p0, change = linear.expand_along(u, x)
    gaps = [float((_at(model, step * u, x) - at_p0 - step * change).norm()) for step in (4e-3, 2e-3, 1e-3)]
    for larger, smaller in pairwise(gaps):
        assert 3.5 <= larger / smaller <= 4.5


def test_a_model_linear_in_its_parameters_is_itself() -> None:
    """Invariant 4."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(7, 5)
    u = _direction(model, 1, scale=2.0)
    edited = LinearizedModel(model).apply_task_vector_(u)
    assert _error(edited(x), _at(model, u, x)) <= 1e-6


def test_the_gradient_does_not_depend_on_p_and_is_that_of_the_model() -> None:
    """Invariant 5."""
    model, x = _network(), _inputs()
    linear = LinearizedModel(model)
    g = torch.randn(6, 4, dtype=F64)

    def gradients() -> dict[str, Tensor]:
        linear.zero_grad()
        linear(x).backward(g)
        return {name: parameter.grad.clone() for name, parameter in linear.params.named_parameters() if parameter.grad is not None}

    at_p0 = gradients()
    linear.apply_task_vector_(_direction(model, 3, scale=3.0))
    elsewhere = gradients()
    reference = copy.deepcopy(model).eval()
    reference(x).backward(g)
    assert len(at_p0) == len(list(model.parameters()))
    for name, parameter in reference.named_parameters():
        assert torch.equal(at_p0[name], elsewhere[name])
        assert parameter.grad is not None
        torch.testing.assert_close(at_p0[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_the_mode_never_matters() -> None:
    """Invariant 8: dropout, batch norm and train() change nothing, and the caller's model is left alone."""
    model, x = _network(), _inputs()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linear = LinearizedModel(model).apply_task_vector_(_direction(model, 1))
    evaluated = linear.eval()(x)
    assert torch.equal(linear.train()(x), evaluated)
    assert linear.training
    assert torch.equal(linear(x), evaluated)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_are_named_after_the_models_and_everything_is_saved() -> None:
    model, x = _network(seed=1), _inputs()
    linear = LinearizedModel(model).apply_task_vector_(_direction(model, 1))
    assert [name for name, _ in linear.named_parameters()] == [f"params.{name}" for name, _ in model.named_parameters()]
    state = linear.state_dict()
    assert {name.removeprefix("base.") for name in state if name.startswith("base.")} == set(model.state_dict())
    other = LinearizedModel(_network(seed=2))
    assert not torch.equal(other(x), linear(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), linear(x))


def test_parameters_frozen_in_the_model_stay_so() -> None:
    model = _network()
    model.conv.requires_grad_(False)
    linear = LinearizedModel(model)
    frozen = {name for name, parameter in linear.named_parameters() if not parameter.requires_grad}
    assert frozen == {"params.conv.weight", "params.conv.bias"}
    linear(_inputs()).sum().backward()


@pytest.mark.parametrize("moved", [False, True])
def test_tied_parameters_are_one(moved: bool) -> None:
    torch.manual_seed(0)
    model, ids = Tied().to(F64), torch.tensor([[0, 3], [6, 2]])
    linear = LinearizedModel(model)
    if moved:
        # As a move to another device does, this makes two buffers of the tied one.
        linear = linear.float().double()
    assert [name for name, _ in linear.named_parameters()] == ["params.table.weight", "params.out.bias"]
    reference = copy.deepcopy(model)
    g = torch.randn(2, 2, 7, dtype=F64)
    reference(ids).backward(g)
    linear(ids).backward(g)
    for (_, tau), (_, parameter) in zip(linear.params.named_parameters(), reference.named_parameters(), strict=True):
        assert tau.grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(tau.grad, parameter.grad, rtol=1e-5 if moved else 1e-12, atol=1e-5 if moved else 1e-12)
    vector = copy.deepcopy(linear).apply_task_vector_(_direction(model, 1)).task_vector()
    assert set(vector.names) == {"table.weight", "out.weight", "out.bias"}
    assert torch.equal(linear.apply_task_vector_(vector).task_vector()["out.weight"], vector["table.weight"])
    different = TaskVector.from_deltas({"table.weight": torch.ones(7, 3), "out.weight": torch.zeros(7, 3)}, regime="linear")
    with pytest.raises(ValueError, match=r"'out.weight': is tied to 'table.weight', but the vector has different deltas"):
        linear.apply_task_vector_(different)


def test_a_pair_whose_ties_differ() -> None:
    torch.manual_seed(0)
    tied, ids = Tied().to(F64), torch.tensor([[0, 3], [6, 2]])
    untied = copy.deepcopy(tied)
    untied.out.weight = nn.Parameter(tied.out.weight + 1)
    for base, finetuned in ((tied, untied), (untied, tied)):
        linear = LinearizedModel.from_pretrained_pair(base, finetuned)
        assert len(list(linear.parameters())) == 3
        torch.testing.assert_close(linear.task_vector()["out.weight"], finetuned.out.weight - base.out.weight)
        assert linear(ids).shape == (2, 2, 7)


@pytest.mark.parametrize("form", ["tuple", "dict", "named"])
def test_outputs_of_any_structure(form: str) -> None:
    torch.manual_seed(0)
    model, x = Structured(form).to(F64), torch.randn(4, 3, dtype=F64)
    linear = LinearizedModel(model).apply_task_vector_(_direction(model, 1))
    outputs = linear(x, scale=2.0)
    at_p0, change = linear.expand(x, scale=2.0)
    if form == "tuple":
        first, second = outputs
        torch.testing.assert_close(first, at_p0[0] + change[0])
    elif form == "dict":
        first, second = outputs["logits"], outputs["hidden"][0]
        assert outputs["hidden"][1] is None
    else:
        assert isinstance(outputs, Pair)
        assert outputs.hidden is None
        return
    y = torch.tanh(model.linear(x)) * 2
    torch.testing.assert_close(second, y**2 + 2 * y * (first - y))


@pytest.mark.parametrize(("form", "got"), [("ids", "got torch.int64"), ("object", "got object")])
def test_outputs_without_a_derivative_are_refused(form: str, got: str) -> None:
    with pytest.raises(TypeError, match=f"LinearizedModel: outputs: expected .*{got}"):
        LinearizedModel(Structured(form))(torch.randn(4, 3))


def test_post_hoc_linearisation() -> None:
    base, x = _network(), _inputs()
    finetuned = copy.deepcopy(base)
    vector = _direction(base, 1)
    vector.as_regime("nonlinear").apply_to_(finetuned)
    nn.init.constant_(finetuned.get_buffer("norm.running_mean"), 5)
    linear = LinearizedModel.from_pretrained_pair(base, finetuned)
    expected = LinearizedModel(base).apply_task_vector_(vector)
    torch.testing.assert_close(linear(x), expected(x))
    assert linear.task_vector().regime == "linear"


def test_small_updates_of_a_narrow_model_are_kept() -> None:
    model = nn.Linear(4, 3).bfloat16()
    linear = LinearizedModel(model)
    assert all(parameter.dtype == torch.float32 for parameter in linear.parameters())
    for _ in range(3):
        linear.apply_task_vector_(TaskVector.from_deltas({"weight": torch.full((3, 4), 1e-4)}, regime="linear"))
    for moved in (linear, linear.bfloat16(), linear.half(), linear.to(dtype=torch.bfloat16)):
        torch.testing.assert_close(moved.task_vector()["weight"], torch.full((3, 4), 3e-4))
        assert moved.base.weight.dtype in (torch.bfloat16, torch.float16)
    x = torch.randn(5, 4).bfloat16()
    at_p0, change = linear.expand(x)
    torch.testing.assert_close(change.float(), (x.float() @ torch.full((4, 3), 3e-4)), rtol=2e-2, atol=1e-6)
    assert linear(x).dtype == at_p0.dtype == torch.bfloat16
    assert all(parameter.dtype == F64 for parameter in LinearizedModel(model.double()).parameters())


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3)


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.3)


def _adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.3, maximize=True)


def _adafactor(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.3)


@pytest.mark.parametrize("make", [_adamw, _sgd, _adam])
def test_decay_of_whole_weights_is_that_of_ordinary_training(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    """On a model linear in its parameters both trainings take the same path."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).to(F64), torch.randn(16, 4, dtype=F64), torch.randn(16, 3, dtype=F64)
    linear, unused = LinearizedModel(model), nn.Parameter(torch.ones(2))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ordinary, tangent, decayed = make(list(model.parameters())), make([*linear.parameters(), unused]), LinearizedModel(model)
    linear.decay_whole_weights(tangent)
    handle = decayed.decay_whole_weights(wrong := make(list(decayed.parameters())))
    handle.remove()
    for step in range(30):
        for group in (*ordinary.param_groups, *tangent.param_groups, *wrong.param_groups):
            group["lr"] = 1e-2 / (1 + step)
        for one, optimizer in ((model, ordinary), (linear, tangent), (decayed, wrong)):
            optimizer.zero_grad()
            functional.mse_loss(one(x), y).backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(start[name] + linear.task_vector()[name], parameter.detach(), rtol=1e-10, atol=1e-10)
    assert _error(model.weight, start["weight"] + decayed.task_vector()["weight"]) > 1e-4
    assert torch.equal(unused, torch.ones(2))


def test_closures_are_refused_where_they_would_lose_the_decay() -> None:
    linear, x = LinearizedModel(nn.Linear(4, 3)), torch.randn(5, 4)

    def loss() -> float:
        linear.zero_grad()
        outputs: Tensor = linear(x).square().sum()
        outputs.backward()
        return float(outputs.detach())

    added = _sgd(list(linear.parameters()))
    linear.decay_whole_weights(added)
    loss()
    with pytest.raises(RuntimeError, match="a closure computes the gradients after the base's decay was added"):
        added.step(loss)
    assert linear.task_vector().norm() == 0
    # Where the decay comes after the step, a closure is no different.
    found = []
    for closure in (loss, None):
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.zero_()
        optimizer = _adamw(list(linear.parameters()))
        linear.decay_whole_weights(optimizer)
        loss()
        optimizer.step(closure)
        found.append(linear.task_vector()["weight"])
    assert found[0].any()
    assert torch.equal(*found)


def test_optimizers_whose_decay_is_not_known_are_asked_about() -> None:
    linear = LinearizedModel(nn.Linear(2, 2))

    class Own(torch.optim.SGD):
        pass

    class Other(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(list(linear.parameters()), {"lr": 0.1, "weight_decay": 0.1})

    linear.decay_whole_weights(Own(linear.parameters()))
    linear.decay_whole_weights(_adafactor(list(linear.parameters())))
    with pytest.raises(TypeError, match="optimizer: ASGD is not known here"):
        linear.decay_whole_weights(torch.optim.ASGD(linear.parameters(), weight_decay=0.1))
    with pytest.raises(TypeError, match="optimizer: Other is not known here; say decoupled=True"):
        linear.decay_whole_weights(Other())
    linear.decay_whole_weights(Other(), decoupled=True)
    with pytest.raises(ValueError, match="expected one over parameters of this model"):
        linear.decay_whole_weights(torch.optim.SGD(nn.Linear(2, 2).parameters()))


def test_bad_models_are_refused() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"init_model: expected the parameters of model; only model has \['bias'\]"):
        LinearizedModel(model, nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match=r"init_model: parameter 'weight': expected shape \(2, 3\), got \(2, 4\)"):
        LinearizedModel(model, nn.Linear(4, 2))
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.bias, torch.nan)
    with pytest.raises(ValueError, match="init_model: parameter 'bias' holds values that are not finite"):
        LinearizedModel(model, broken)
    with pytest.raises(ValueError, match="ReLU has no floating-point parameter"):
        LinearizedModel(nn.ReLU())
    with pytest.raises(TypeError, match=r"parameter 'weight': expected a floating-point or integer tensor, got torch\.complex64"):
        LinearizedModel(nn.Linear(3, 2, dtype=torch.complex64))


def test_bad_vectors_are_refused_and_change_nothing() -> None:
    model = _network()
    linear = LinearizedModel(model)
    good = _direction(model, 1)
    wrong: Any = dict(good)
    with pytest.raises(ValueError, match=r"expected a linear task vector, got a nonlinear one; .*as_regime\('linear'\)"):
        linear.apply_task_vector_(good.as_regime("nonlinear"))
    with pytest.raises(TypeError, match="expected a TaskVector, got dict"):
        linear.apply_task_vector_(wrong)
    with pytest.raises(ValueError, match="alpha: expected a finite number, got nan"):
        linear.apply_task_vector_(good, float("nan"))
    bad = {
        "conv.weight2": (KeyError, torch.zeros(3), "'conv.weight2': the model has no such parameter"),
        "conv.bias": (ValueError, torch.zeros(4), r"'conv.bias': expected shape \(3,\), got \(4,\)"),
        "norm.running_mean": (ValueError, torch.ones(3), "'norm.running_mean': is no parameter of the model but a buffer"),
    }
    for name, (error, delta, message) in bad.items():
        with pytest.raises(error, match=message):
            linear.apply_task_vector_(TaskVector.from_deltas({**good, name: delta}, regime="linear"))
    assert linear.task_vector().norm() == 0
    whole = TaskVector(model.state_dict(), good.apply_to(model.state_dict()), regime="linear")
    assert "norm.running_mean" in whole.names
    torch.testing.assert_close(linear.apply_task_vector_(whole, 2.0).task_vector()["conv.bias"], 2 * good["conv.bias"])


def test_algebra_of_its_vectors() -> None:
    """Invariant 8: -(-tau) = tau and tau1 + tau2 - tau2 = tau1."""
    model = _network(torch.float32)
    linear = LinearizedModel(model)
    u, v = (copy.deepcopy(linear).apply_task_vector_(_direction(model, seed)).task_vector() for seed in (1, 2))
    opposite = -u
    for name in u.names:
        assert torch.equal((-opposite)[name], u[name])
        torch.testing.assert_close((u + v - v)[name], u[name], rtol=2**-23, atol=0)
    with pytest.raises(ValueError, match="linear"):
        u + v.as_regime("nonlinear")


def test_linear_training_fits_what_the_expansion_can(poisoned_memory: None) -> None:
    """A few steps of gradient descent on tau reduce a convex loss, and only tau changes."""
    model, x = _network(), _inputs()
    linear = LinearizedModel(model)
    base = {name: buffer.clone() for name, buffer in linear.base.named_buffers()}
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.05)
    target, losses = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(5)), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = functional.mse_loss(linear(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(buffer, base[name]) for name, buffer in linear.base.named_buffers())
    state = {**dict(linear.base.named_buffers()), **linear.task_vector().apply_to(dict(linear.base.named_buffers()))}
    assert torch.isfinite(functional_call(linear.base, state, (x,))).all()


def test_a_layer_that_the_model_has_twice_stays_the_bases() -> None:
    layer = nn.Linear(5, 5)
    linearized = LinearizedModel(nn.Sequential(layer, nn.Tanh(), layer))
    with torch.no_grad():
        for tau in linearized.params.parameters():
            tau.fill_(0.1)
    x = torch.randn(3, 5)
    own = list(linearized.base.buffers())
    expected = linearized(x)
    assert all(one is other for one, other in zip(own, linearized.base.buffers(), strict=True))
    assert torch.equal(copy.deepcopy(linearized)(x), expected)


def test_edits_of_a_layer_that_the_model_has_twice_do_not_stay() -> None:
    layer = nn.Linear(5, 5)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 5)
    vector = TaskVector.from_deltas({name: torch.full_like(one, 0.1) for name, one in model.state_dict().items()})
    edited = EditedModel(model)
    for factor in (1.0, 2.0, 3.0, 4.0, 1.0):
        assert torch.equal(edited(factor * vector, x, 0), vector.apply_to(model, factor)(x))


def test_a_kernel_leaves_a_layer_that_the_model_has_twice() -> None:
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    own = list(model.parameters())
    ntk_matrix(model, torch.randn(3, 5))
    assert all(one is other for one, other in zip(own, model.parameters(), strict=True))
