"""Models and task vectors for the tests of aTLAS."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taskloom.methods.merging.atlas.coefficients import Coefficients


def encoder(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small network with matrices, biases and gains of odd sizes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 5)).to(dtype)


def tuned(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state of a fine-tuning of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for name, value in model.state_dict().items()
    }


def vectors(model: nn.Module, count: int = 3, dtype: torch.dtype | None = None) -> list[dict[str, Tensor]]:
    """Task vectors of a model's parameters."""
    own = dict(model.named_parameters())
    return [
        {name: (value - own[name].detach()).to(dtype or value.dtype) for name, value in tuned(model, seed).items() if name in own}
        for seed in range(1, count + 1)
    ]


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with another state."""
    changed = copy.deepcopy(model)
    changed.load_state_dict(state)
    return changed


def rows(count: int = 6, width: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(dtype)


def spread(coef: Tensor) -> None:
    """Set coefficients to values that differ."""
    with torch.no_grad():
        coef.copy_(torch.linspace(-0.9, 1.1, coef.numel(), dtype=torch.float64).view_as(coef))


def error(got: Tensor, expected: Tensor) -> float:
    """The relative error in the Frobenius norm."""
    reference = expected.detach().double()
    difference, size = (float(torch.linalg.vector_norm(one)) for one in (got.detach().double() - reference, reference))
    return difference / size if size else difference


def check_compiled(adapter: Coefficients, x: Tensor, tolerance: float) -> None:
    """Outputs and the coefficients' gradient of an adapter compiled as one graph are those without."""
    expected = adapter(x)
    expected.square().sum().backward()
    gradient, adapter.coef.grad = adapter.coef.grad, None
    torch.compiler.reset()
    got = torch.compile(adapter, fullgraph=True, backend="aot_eager")(x)
    got.square().sum().backward()
    assert gradient is not None
    assert adapter.coef.grad is not None
    assert error(got, expected) <= tolerance
    assert error(adapter.coef.grad, gradient) <= tolerance
