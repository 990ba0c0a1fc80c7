"""AtlasModel where parts of the forward pass run again in the backward pass, and where weights are installed or gradients accumulated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from atlas_samples import encoder, error, rows, spread, vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taskloom
from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas import AtlasModel


class _Checkpointed(nn.Module):
    """A model parts of which run again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.reentrant = reentrant

    def _part(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None:
            return part(x)
        result: Tensor = checkpoint(part, x, use_reentrant=self.reentrant)
        return result

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self._part(lambda x: self.second(torch.tanh(self.first(x))).tanh(), x)
        return {"logits": [self._part(lambda x: self.third(x).tanh() * self.first(x), x)]}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_checkpointed_parts_meet_the_composed_weights_again(backend: str) -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(None), rows()
    gradients = []
    for reentrant in (None, False):
        model.reentrant = reentrant
        adapter = AtlasModel(model, vectors(model))
        spread(adapter.coef)
        own = list(model.parameters())
        with taskloom.backend(backend):
            first, second = adapter(x)["logits"][0], adapter(x + 1)["logits"][0]
            with torch.no_grad():
                adapter.coef.add_(0.5)
            (first.square().sum() + second.sum() + adapter(x)["logits"][0].sum()).backward()
        gradients.append(adapter.coef.grad)
        assert all(one is other for one, other in zip(own, model.parameters(), strict=True))
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert error(gradients[1], gradients[0]) <= 1e-6


def test_the_adapter_can_be_checkpointed_itself() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    adapter(x).square().sum().backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    checkpoint(adapter, x, use_reentrant=False).square().sum().backward()
    assert expected is not None
    assert adapter.coef.grad is not None
    assert error(adapter.coef.grad, expected) <= 1e-6


def test_a_backward_pass_that_raised_leaves_no_other_weights_behind() -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(False), rows().requires_grad_()
    adapter = AtlasModel(model, vectors(model))
    own = list(model.parameters())

    def stop(gradient: Tensor) -> None:
        raise KeyError("stop")

    x.register_hook(stop)
    spread(adapter.coef)
    expected = adapter(x)["logits"][0]
    with pytest.raises(KeyError, match="stop"):
        adapter(x)["logits"][0].sum().backward()
    assert all(one is other for one, other in zip(own, model.parameters(), strict=True))
    assert torch.equal(adapter(x)["logits"][0], expected)
    assert copy.deepcopy(adapter).double()(x.double())["logits"][0].dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_passes_of_forward_passes_with_one_composition(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(None), rows().requires_grad_()
    gradients = []
    for model.reentrant in (None, reentrant):
        adapter = AtlasModel(model, vectors(model))
        spread(adapter.coef)
        with adapter.compose():
            outputs = [adapter(x)["logits"][0], adapter(x + 1)["logits"][0]]
            for output in outputs:
                output.square().sum().backward()
        assert adapter.coef.grad is not None
        gradients.append(adapter.coef.grad)
    assert error(gradients[1], gradients[0]) <= 1e-6


class _Two(nn.Module):
    """A model whose two outputs have nothing in common."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(7, 3)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> list[Tensor]:
        parts: list[Callable[[Tensor], Tensor]] = [lambda x: self.first(x).tanh(), lambda x: self.second(x).tanh()]
        return [part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant) for part in parts]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("retain", [False, True])
def test_several_backward_passes_of_one_forward_pass(reentrant: bool, retain: bool) -> None:
    torch.manual_seed(0)
    model, x = _Two(), rows().requires_grad_()
    gradients = []
    for model.reentrant in (None, reentrant):
        adapter = AtlasModel(model, vectors(model))
        spread(adapter.coef)
        outputs = adapter(x)
        if retain:
            loss = outputs[0].square().sum() + outputs[1].square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        else:
            for output in outputs:
                output.square().sum().backward()
        assert adapter.coef.grad is not None
        gradients.append(adapter.coef.grad)
    assert error(gradients[1], gradients[0]) <= 1e-6


def test_a_backward_pass_after_another_ones_step_is_an_error() -> None:
    model = _Two()
    model.reentrant = False
    adapter = AtlasModel(model, vectors(model))
    first, second = adapter(rows())
    first.sum().backward()
    with torch.no_grad():
        adapter.coef.add_(1)
    with pytest.raises(RuntimeError, match="coef was changed since the forward pass"):
        second.sum().backward()
    assert all(isinstance(one, nn.Parameter) for one in model.parameters())


class _Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(7, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(lambda x: self.norm(self.layer(x)).tanh(), x, use_reentrant=False)
        return result


def test_running_statistics_stay_the_bases_in_checkpointed_parts() -> None:
    torch.manual_seed(0)
    model = _Normalised().train()
    own, before = list(model.buffers()), copy.deepcopy(dict(model.named_buffers()))
    adapter = AtlasModel(model, vectors(model))
    adapter(rows()).square().sum().backward()
    assert adapter.coef.grad is not None
    assert all(one is other for one, other in zip(own, model.buffers(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("reentrant", [None, False])
def test_adapters_of_one_base(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model, norms, x = _Checkpointed(reentrant), _Normalised().train(), rows()
    own = [*model.parameters(), *norms.parameters(), *norms.buffers()]
    adapters = [AtlasModel(model, vectors(model)), AtlasModel(model, vectors(model)[:2], granularity="vector")]
    normalised = [AtlasModel(norms, vectors(norms)) for _ in range(2)]
    expected = []
    for adapter in adapters:
        spread(adapter.coef)
        adapter(x)["logits"][0].square().sum().backward()
        expected.append(adapter.coef.grad)
        adapter.coef.grad = None
    sum((one(x)["logits"][0].square().sum() for one in adapters), torch.zeros(())).backward()
    sum((one(x).square().sum() for one in normalised), torch.zeros(())).backward()
    assert all(one is other for one, other in zip(own, [*model.parameters(), *norms.parameters(), *norms.buffers()], strict=True))
    for adapter, gradient in zip(adapters, expected, strict=True):
        assert adapter.coef.grad is not None
        assert gradient is not None
        assert error(adapter.coef.grad, gradient) <= 1e-6
    first, second = (adapter(x)["logits"][0] for adapter in adapters)
    with adapters[0].installed():
        assert torch.equal(adapters[1](x)["logits"][0], second)
        second.sum().backward()
        with adapters[1].installed():
            assert torch.equal(model(x)["logits"][0], second)
        assert torch.equal(model(x)["logits"][0], first)
    assert all(one is other for one, other in zip(own, [*model.parameters(), *norms.parameters(), *norms.buffers()], strict=True))


def test_what_is_installed_is_neither_copied_nor_moved() -> None:
    model = encoder()
    adapter, other = AtlasModel(model, vectors(model)), AtlasModel(model, vectors(model))
    with adapter.installed():
        with pytest.raises(RuntimeError, match="cannot be copied while composed weights are in the model"):
            copy.deepcopy(adapter)
        with pytest.raises(RuntimeError, match="cannot be moved or converted while composed weights are in the model"):
            adapter.double()
        with pytest.raises(RuntimeError, match="cannot be copied while composed weights are in the model"):
            copy.deepcopy(other)
    assert copy.deepcopy(adapter).double().coef.dtype == torch.float64


def test_weights_can_be_installed_for_a_while() -> None:
    model, x = encoder(), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    expected, base = adapter(x), model(x)
    with adapter.installed() as installed:
        assert installed is model
        assert torch.equal(model(x), expected)
        assert not model(x).requires_grad
        adapter(x).square().sum().backward()
        assert torch.equal(model(x), expected)
        with torch.no_grad():
            adapter.coef.zero_()
        assert torch.equal(adapter(x), base)
        with adapter.installed():
            assert torch.equal(model(x), base)
    assert torch.equal(model(x), base)
    assert all(isinstance(one, nn.Parameter) for one in model.parameters())


@pytest.mark.parametrize("reentrant", [None, False])
def test_backward_passes_of_their_own_accumulate(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(reentrant), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    losses = [lambda: adapter(x)["logits"][0].square().sum(), lambda: adapter(x + 1)["logits"][0].sum()]
    (losses[0]() + losses[1]()).backward()
    expected, adapter.coef.grad = adapter.coef.grad, None
    with adapter.compose(accumulate=True):
        for loss in losses:
            loss().backward()
        assert adapter.coef.grad is None
    assert expected is not None
    assert adapter.coef.grad is not None
    assert error(adapter.coef.grad, expected) <= 1e-6
    with adapter.compose(accumulate=True):
        losses[0]().backward()
        with torch.no_grad():
            adapter.coef.add_(0)
        losses[1]().backward()
    assert error(adapter.coef.grad, 2 * expected) <= 1e-6
    with adapter.compose(accumulate=True), torch.no_grad():
        adapter(x)


@pytest.mark.gpu
def test_checkpointed_on_a_gpu() -> None:
    torch.manual_seed(0)
    model, x = _Checkpointed(None).cuda(), rows().cuda()
    gradients = []
    for reentrant in (None, False):
        model.reentrant = reentrant
        adapter = AtlasModel(model, vectors(_Checkpointed(None)))
        spread(adapter.coef)
        adapter(x)["logits"][0].square().sum().backward()
        assert adapter.coef.grad is not None
        gradients.append(adapter.coef.grad)
    assert error(gradients[1], gradients[0]) <= 1e-5


class _PassesOn(nn.Module):
    """A model that returns its input too, in an object of a type that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        result = SimpleNamespace(given=x, logits=checkpoint(lambda x: self.layer(x).tanh() * self.layer(x), x, use_reentrant=False))
        result.itself = result
        return result


def test_outputs_of_any_type_and_inputs_among_them() -> None:
    torch.manual_seed(0)
    model, x = _PassesOn(), rows()
    adapter = AtlasModel(model, vectors(model))
    spread(adapter.coef)
    source = torch.ones(7, requires_grad=True)
    given = x * source
    result = adapter(given)
    result.logits.square().sum().backward(retain_graph=True)
    weight, bias = (adapter.materialize()[name] for name in ("layer.weight", "layer.bias"))
    own = torch.ones(7, requires_grad=True)
    y = nn.functional.linear(x * own, weight, bias)
    (y.tanh() * y).square().sum().backward()
    assert source.grad is not None
    assert own.grad is not None
    assert error(source.grad, own.grad) <= 1e-5
    fresh = adapter(given)
    fresh.logits.sum().backward(inputs=[adapter.coef])
    fresh.given.sum().backward()
    assert error(source.grad, own.grad + x.sum(0)) <= 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    tokens = torch.randint(0, 50, (2, 9))
    task_vector = TaskVector.from_deltas({name: 0.05 * torch.randn_like(one) for name, one in model.named_parameters()})
    adapter = AtlasModel(model, [task_vector, -0.5 * task_vector])
    with torch.no_grad():
        adapter.coef.fill_(0.7)
    gradients = []
    for _ in range(2):
        adapter.train()(input_ids=tokens, labels=tokens).loss.backward()
        assert adapter.coef.grad is not None
        gradients.append(adapter.coef.grad.clone())
        adapter.coef.grad = None
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert error(gradients[1], gradients[0]) <= 1e-6
    changed = copy.deepcopy(model).eval()
    changed.load_state_dict(adapter.eval().materialize())
    assert torch.equal(adapter(input_ids=tokens).logits, changed(tokens).logits)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with adapter.installed() as installed:
        assert torch.equal(installed.generate(tokens[:1], **settings), changed.generate(tokens[:1], **settings))
