"""Optimiser steps inside functions that torch.compile compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskloom.optim import MaskedAdamW, MaskedSGD

KINDS = [(MaskedAdamW, {}), (MaskedSGD, {"momentum": 0.9})]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _training(kind: Any, options: dict[str, Any]) -> tuple[nn.Linear, Any]:
    model = nn.Linear(13, 7)
    with torch.no_grad():
        for place, param in enumerate(model.parameters()):
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(place)))
    return model, kind(model.parameters(), 0.3, lr=0.1, **options)


def _data(step: int) -> Tensor:
    return torch.randn(5, 13, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_compiled_training_step_trains_as_an_eager_one(kind: Any, options: dict[str, Any]) -> None:
    models = []
    for compile_it in (False, True):
        model, optimizer = _training(kind, options)

        def train(batch: Tensor, model: nn.Linear = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

        run = torch.compile(train, backend="eager") if compile_it else train
        for step in range(4):
            run(_data(step))
        assert {float(optimizer.state[param]["step"]) for param in model.parameters()} == {4.0}
        models.append(model)
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_step_alone_is_compiled_once_for_all_its_numbers(kind: Any, options: dict[str, Any]) -> None:
    model, optimizer = _training(kind, options)
    graphs: list[Any] = []
    made: list[int] = []

    def note(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    step = torch.compile(optimizer.step, backend=note)
    for number in range(6):
        model(_data(number)).square().mean().backward()
        step()
        made.append(len(graphs))
    assert made[-1] == made[1]
    assert {float(optimizer.state[param]["step"]) for param in model.parameters()} == {6.0}


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_one_graph_for_a_step_is_refused_and_changes_nothing(kind: Any, options: dict[str, Any]) -> None:
    model, optimizer = _training(kind, options)
    model(_data(0)).square().mean().backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"`MaskedOptimizer\._step_batch` should not be traced"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
