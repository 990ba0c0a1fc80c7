"""The choice of alpha, the weight disentanglement error and the tangent kernel, against their definitions."""

from __future__ import annotations

import copy
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from taskloom.merge import TaskVector
from taskloom.methods.merging.tangent_arithmetic import (
    Control,
    EditedModel,
    LinearizedModel,
    disentanglement_error,
    local_energy,
    nonlinear_advantage,
    ntk_matrix,
    search_alpha,
)

F64 = torch.float64
# What a caller without a type checker may pass.
WRONG: Any = "best"
HEADS = 3


class Network(nn.Module):
    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, outputs)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, norm, last = self.layers
        outputs: Tensor = last(self.drop(torch.tanh(norm(first(x)))))
        return outputs


def _network(outputs: int = 4) -> Network:
    torch.manual_seed(0)
    network = Network(outputs).to(F64)
    network(torch.randn(50, 5, dtype=F64))
    return network


def _points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _vector(model: nn.Module, seed: int, regime: str, scale: float = 0.5) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: scale * torch.randn(one.shape, generator=generator, dtype=F64) for name, one in model.named_parameters()}
    return TaskVector.from_deltas(deltas, regime=regime)


def _heads() -> list[nn.Linear]:
    torch.manual_seed(9)
    return [nn.Linear(4, 3).to(F64) for _ in range(HEADS)]


def _loaders() -> list[list[Tensor | tuple[Tensor, Tensor]]]:
    """Plain inputs, batches with labels, and one batch."""
    first, second, third = (_points(count, seed) for count, seed in ((13, 1), (9, 2), (20, 3)))
    return [list(first.split(5)), [(part, torch.zeros(len(part))) for part in second.split(4)], [third]]


@torch.no_grad()
def _outputs(model: nn.Module, vector: TaskVector, x: Tensor, head: nn.Linear) -> Tensor:
    """The definition: the weights are changed, and the model is run."""
    if vector.regime == "linear":
        edited: nn.Module = LinearizedModel(model).apply_task_vector_(vector)
    else:
        edited = vector.apply_to(model).eval()
    outputs: Tensor = head(edited(x))
    return outputs


def _xi(model: nn.Module, vectors: list[TaskVector], alphas: list[float]) -> float:
    total, heads = 0.0, _heads()
    together = sum(alpha * vector for alpha, vector in zip(alphas, vectors, strict=True))
    assert isinstance(together, TaskVector)
    for task, (alpha, vector, loader) in enumerate(zip(alphas, vectors, _loaders(), strict=False)):
        x = torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in loader])
        alone, edited = (_outputs(model, one, x, heads[task]).argmax(1) for one in (alpha * vector, together))
        total += float((alone != edited).double().mean())
    return total


def _edited(model: nn.Module, regime: str) -> EditedModel:
    return EditedModel(LinearizedModel(model) if regime == "linear" else model, _heads())


@pytest.mark.parametrize("regime", ["linear", "nonlinear"])
def test_error_of_a_pair_is_its_definition(regime: str) -> None:
    """Invariant 7."""
    model = _network().train()
    vectors, alphas = [_vector(model, seed, regime) for seed in (1, 2)], [-1.0, 0.0, 2.0]
    got = disentanglement_error(_edited(model, regime), vectors, _loaders()[:2], alphas)
    assert (got.dtype, tuple(got.shape)) == (F64, (3, 3))
    expected = torch.tensor([[_xi(model, vectors, [a1, a2]) for a2 in alphas] for a1 in alphas], dtype=F64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    assert got[1, 1] == 0
    assert got.max() > 0.3
    # xi(a, 0) has only the second task's predictions, of the base and of the model edited by the first vector.
    heads, second = _heads(), _points(9, 2)
    base, other = (_outputs(model, alpha * vectors[0], second, heads[1]).argmax(1) for alpha in (0.0, 2.0))
    assert got[2, 1] == (base != other).double().mean()
    swapped = disentanglement_error(
        EditedModel(LinearizedModel(model) if regime == "linear" else model, _heads()[1::-1]), vectors[::-1], _loaders()[1::-1], alphas
    )
    torch.testing.assert_close(swapped, got.T, rtol=0, atol=1e-15)


@pytest.mark.parametrize("regime", ["linear", "nonlinear"])
def test_error_of_several_tasks(regime: str) -> None:
    model = _network()
    vectors = [_vector(model, seed, regime) for seed in (1, 2, 3)]
    predict = _edited(model, regime)
    for alphas in (0.7, [0.2, -1.0, 1.5]):
        numbers = [0.7] * 3 if isinstance(alphas, float) else alphas
        assert float(disentanglement_error(predict, vectors, _loaders(), alphas)) == pytest.approx(_xi(model, vectors, numbers))
    assert float(disentanglement_error(predict, vectors[:1], _loaders()[:1], 0.7)) == 0
    assert tuple(disentanglement_error(predict, vectors[:2], _loaders()[:2], 0.7).shape) == ()
    # A plain function is as good as an EditedModel, without its shortcut.
    plain = disentanglement_error(lambda vector, x, task: predict(vector, x, task), vectors, _loaders(), 0.7)
    assert float(plain) == float(disentanglement_error(predict, vectors, _loaders(), 0.7))


def test_distances_of_ones_own() -> None:
    model = _network()
    vectors = [_vector(model, seed, "linear") for seed in (1, 2)]
    predict = _edited(model, "linear")

    def squared(alone: Tensor, together: Tensor) -> Tensor:
        return (alone - together).square().sum(1)

    once, twice = (float(disentanglement_error(predict, vectors, _loaders()[:2], alpha, squared)) for alpha in (1.0, 2.0))
    assert twice == pytest.approx(4 * once)
    with pytest.raises(ValueError, match=r"dist: expected shape \(5,\), got \(\)"):
        disentanglement_error(predict, vectors, _loaders()[:2], 1.0, lambda alone, together: (alone - together).mean())
    with pytest.raises(ValueError, match="dist: expected 'argmax' or a function, got 'best'"):
        disentanglement_error(predict, vectors, _loaders()[:2], 1.0, WRONG)


def test_a_linear_model_takes_one_pass_per_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = _network(), list[TaskVector]()
    whole = LinearizedModel.expand_along

    def counted(self: LinearizedModel, vector: TaskVector, x: Tensor) -> tuple[Any, Any]:
        calls.append(vector)
        return whole(self, vector, x)

    monkeypatch.setattr(LinearizedModel, "expand_along", counted)
    vectors = [_vector(model, seed, "linear") for seed in (1, 2)]
    disentanglement_error(_edited(model, "linear"), vectors, [[_points(5, 1)], [_points(5, 2)]], [0.0, 0.5, 1.0])
    assert len(calls) == 4


def test_bad_input_of_the_error() -> None:
    model = _network()
    vectors, loaders = [_vector(model, seed, "nonlinear") for seed in (1, 2)], _loaders()[:2]
    predict = _edited(model, "nonlinear")
    with pytest.raises(ValueError, match="task_vectors: expected at least one, got none"):
        disentanglement_error(predict, [], [], 1.0)
    with pytest.raises(ValueError, match=r"loaders: expected one per task vector \(2\), got 1"):
        disentanglement_error(predict, vectors, loaders[:1], 1.0)
    with pytest.raises(ValueError, match="expected one regime, got linear and nonlinear"):
        disentanglement_error(predict, [vectors[0], vectors[1].as_regime("linear")], loaders, 1.0)
    with pytest.raises(ValueError, match="expected a nonlinear task vector for an ordinary model, got a linear one"):
        disentanglement_error(predict, [vector.as_regime("linear") for vector in vectors], loaders, 1.0)
    with pytest.raises(ValueError, match="expected a linear task vector, got a nonlinear one"):
        disentanglement_error(_edited(model, "linear"), vectors, loaders, 1.0)
    with pytest.raises(TypeError, match="loaders: expected what can be gone through again, got list_iterator"):
        disentanglement_error(predict, vectors, [iter(loaders[0]), loaders[1]], 1.0)
    with pytest.raises(ValueError, match="expected at least one batch of task 1, got none"):
        disentanglement_error(predict, vectors, [loaders[0], []], 1.0)
    with pytest.raises(ValueError, match="alphas: expected at least one alpha, got none"):
        disentanglement_error(predict, vectors, loaders, [])
    with pytest.raises(ValueError, match=r"alphas: expected one alpha or one per task \(3\), got 2"):
        disentanglement_error(predict, [*vectors, vectors[0]], [*loaders, loaders[0]], [1.0, 2.0])
    with pytest.raises(TypeError, match=r"predict: expected a floating-point tensor, got torch.int64"):
        disentanglement_error(lambda vector, x, task: predict(vector, x, task).argmax(1), vectors, loaders, 1.0)
    with pytest.raises(ValueError, match=r"predict: expected outputs \[N, classes, ...\], got shape \(5,\)"):
        disentanglement_error(lambda vector, x, task: predict(vector, x, task)[:, 0], vectors, loaders, 1.0)
    for wrong in (float("nan"), [0.0, float("inf")]):
        with pytest.raises(ValueError, match=r"alphas: expected finite numbers, got (nan|inf)"):
            disentanglement_error(predict, vectors, loaders, wrong)
    with pytest.raises(ValueError, match="predict: expected outputs that are numbers, got NaN"):
        disentanglement_error(lambda vector, x, task: predict(vector, x, task) * torch.nan, vectors, loaders, 1.0)
    sizes = cycle([5, 1])
    with pytest.raises(ValueError, match=r"predict: expected outputs of one shape for a batch, got \(5, 3\) and \(1, 3\)"):
        disentanglement_error(lambda vector, x, task: predict(vector, x, task)[: next(sizes)], vectors, loaders, 1.0)
    with pytest.raises(TypeError, match="only a LinearizedModel's outputs add up"):
        predict.changes(vectors, _points(3, 1), 0)


def test_alpha_with_the_best_normalised_mean_wins_and_the_first_of_equals() -> None:
    measured = {0.0: (0.2, 0.9), 0.25: (0.5, 0.5), 0.5: (0.5, 0.5), 1.0: (0.1, 0.95)}
    alpha, table = search_alpha(lambda alpha: measured[alpha], list(measured), normalise=[0.5, 1.0])
    assert alpha == 0.25
    assert [row.alpha for row in table] == list(measured)
    assert [row.score for row in table] == pytest.approx([0.65, 0.75, 0.75, 0.575])
    assert table[1].values == (0.5, 0.5)
    assert search_alpha(lambda alpha: -((alpha - 0.35) ** 2))[0] == 0.35
    assert len(search_alpha(lambda alpha: alpha)[1]) == 21
    as_tensors: Any = (lambda alpha: torch.tensor(alpha), lambda alpha: torch.tensor([alpha, 1.0]))
    assert [search_alpha(evaluate, [0.0, 0.5])[0] for evaluate in as_tensors] == [0.5, 0.5]


def test_negation_keeps_its_control() -> None:
    control = Control(lambda alpha: 1 - alpha**2, 0.95)
    alpha, table = search_alpha(lambda alpha: 1 - alpha, constraint=control, goal="min")
    assert alpha == 0.2
    assert [row.alpha for row in table if row.allowed] == [0.0, 0.05, 0.1, 0.15, 0.2]
    assert table[20].control == 0
    with pytest.raises(ValueError, match=r"no alpha keeps the control at 0.95 or above; the best one has 0.75"):
        search_alpha(lambda alpha: alpha, [0.5, 1.0], constraint=control, goal="min")
    with pytest.warns(UserWarning, match="alpha 0 won"):
        assert search_alpha(lambda alpha: alpha, constraint=control, goal="min")[0] == 0


def test_bad_input_of_the_search() -> None:
    with pytest.raises(ValueError, match="grid: expected at least one alpha, got none"):
        search_alpha(lambda alpha: alpha, [])
    with pytest.raises(ValueError, match=r"evaluate\(0.0\): expected a finite number, got nan"):
        search_alpha(lambda alpha: float("nan"))
    with pytest.raises(ValueError, match=r"evaluate\(0.5\): expected 1 values, got 2"):
        search_alpha(lambda alpha: [alpha] * (1 + (alpha >= 0.5)))
    with pytest.raises(ValueError, match=r"evaluate\(0.0\): expected 2 values, got 1"):
        search_alpha(lambda alpha: [alpha], normalise=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"normalise: expected accuracies above 0, got 0\.0"):
        search_alpha(lambda alpha: alpha, normalise=[0.0])
    with pytest.raises(ValueError, match="goal: expected 'max' or 'min', got 'best'"):
        search_alpha(lambda alpha: alpha, goal=WRONG)


def test_nonlinear_advantage() -> None:
    assert nonlinear_advantage(0.9, 0.7, 10) == pytest.approx(0.2 * 10 / 9)
    assert nonlinear_advantage(1.0, 0.1, 10) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="accuracy_linear: expected 0 to 1, got 70"):
        nonlinear_advantage(0.9, 70, 10)
    with pytest.raises(ValueError, match="classes: expected 2 or more, got 1"):
        nonlinear_advantage(0.9, 0.7, 1)


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """[n, C, P] by one backward pass per number."""
    evaluated = copy.deepcopy(model).eval()
    parameters = [parameter for parameter in evaluated.parameters() if parameter.requires_grad]
    rows = []
    for point in x:
        for output in evaluated(point[None])[0]:
            rows.append(torch.cat([one.flatten() for one in torch.autograd.grad(output, parameters, retain_graph=True)]))
    return torch.stack(rows).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_kernel_is_that_of_the_jacobian(batch_size: int) -> None:
    """Invariant 6: symmetric, positive semidefinite, squared gradients on the diagonal."""
    model, x1, x2 = _network().train(), _points(7, 1), _points(5, 2)
    model.layers[0].bias.requires_grad_(False)
    first, second = _jacobian(model, x1), _jacobian(model, x2)
    whole = ntk_matrix(model, x1, x2, "none", batch_size=batch_size)
    torch.testing.assert_close(whole, torch.einsum("icp,jdp->ijcd", first, second))
    torch.testing.assert_close(ntk_matrix(model, x1, x2, batch_size=batch_size), whole.diagonal(dim1=2, dim2=3).mean(2))
    torch.testing.assert_close(ntk_matrix(model, x1, x2, 2), whole[:, :, 2, 2])
    assert all(module.training for module in model.modules())
    own = ntk_matrix(model, x1, reduce="none", batch_size=batch_size)
    for point in range(7):
        torch.testing.assert_close(own[point, point].diagonal(), first[point].square().sum(1))
    matrix = own.permute(0, 2, 1, 3).reshape(28, 28)
    assert torch.equal(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-10
    assert torch.equal(ntk_matrix(model, x1), ntk_matrix(model, x1).T)


def test_a_gradient_step_moves_the_outputs_by_the_kernel() -> None:
    """Invariant 6: a step of size h on half the squared error changes the linearised outputs by -h K r."""
    model, x, h = _network(), _points(6, 1), 1e-2
    linear = LinearizedModel(model)
    target = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(4))
    before = linear(x)
    optimizer = torch.optim.SGD(linear.parameters(), lr=h)
    (functional.mse_loss(before, target, reduction="sum") / 2).backward()
    optimizer.step()
    change = -h * torch.einsum("ijcd,jd->ic", ntk_matrix(model, x, reduce="none"), (before - target).detach())
    torch.testing.assert_close((linear(x) - before).detach(), change, rtol=1e-4, atol=1e-10)


def test_the_whole_jacobian_is_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    einsum = torch.einsum

    def watched(form: str, *tensors: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, *(tensor.numel() for tensor in tensors))
        product: Tensor = einsum(form, *tensors)
        return product

    monkeypatch.setattr(torch, "einsum", watched)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(F64)
    ntk_matrix(model, _points(6, 1))
    assert largest <= 6 * 3 * 64


def test_bad_input_of_the_kernel() -> None:
    model, x = _network(), _points(3, 1)
    with pytest.raises(ValueError, match="reduce: expected an output from 0 to 3, got 4"):
        ntk_matrix(model, x, reduce=4)
    with pytest.raises(ValueError, match="reduce: expected 'trace', 'none' or the number of an output, got 'best'"):
        ntk_matrix(model, x, reduce=WRONG)
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
        ntk_matrix(model, x, batch_size=0)
    with pytest.raises(ValueError, match=r"x2: expected a tensor of one or more points, got \(0, 5\)"):
        ntk_matrix(model, x, x[:0])
    with pytest.raises(ValueError, match=r"model: expected outputs \[n, C\], got \(1, 2, 2\)"):
        ntk_matrix(nn.Sequential(model, nn.Unflatten(1, (2, 2))), x)
    with pytest.raises(ValueError, match="expected at least one parameter that requires a gradient"):
        ntk_matrix(copy.deepcopy(model).requires_grad_(False), x)

    class Chosen(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(TypeError, match=r"expected floating-point outputs, got torch\.int64"):
        ntk_matrix(Chosen().to(F64), x)


def _block_kernel() -> tuple[Tensor, list[int]]:
    """Two groups of three points that share nothing."""
    parts = [torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return torch.block_diag(*(part @ part.T for part in parts)), [0, 0, 0, 1, 1, 1]


def test_local_energy_of_a_local_kernel() -> None:
    kernel, groups = _block_kernel()
    f = torch.cat([torch.randn(3, dtype=F64, generator=torch.Generator().manual_seed(3)), torch.zeros(3, dtype=F64)])
    found = local_energy(kernel, groups, f, energy=1.0)
    assert (found.eigenvalues[:-1] >= found.eigenvalues[1:]).all()
    torch.testing.assert_close(found.shares.sum(1), torch.ones(6, dtype=F64))
    torch.testing.assert_close(found.shares.max(1).values, torch.ones(6, dtype=F64))
    torch.testing.assert_close(found.energy, torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=F64))
    assert len(found.chosen) == 3
    values, vectors = torch.linalg.eigh(kernel)
    carried = (vectors.T @ f).square().flip(0)
    some = local_energy(kernel, groups, f, energy=0.6)
    assert carried[some.chosen].sum() >= 0.6 * f.square().sum()
    assert carried[some.chosen[:-1]].sum() < 0.6 * f.square().sum()
    assert float(some.energy.sum()) == pytest.approx(len(some.chosen))
    by_size = local_energy(kernel, groups, energy=1e-6)
    assert by_size.chosen.tolist() == [0]
    torch.testing.assert_close(by_size.eigenvalues, values.flip(0))


def test_equal_eigenvalues_are_warned_of_where_they_matter() -> None:
    groups, f = [0, 0, 1, 1], torch.tensor([1.0, 0.0, 0.0, 0.0])
    twice = torch.diag(torch.tensor([3.0, 3.0, 2.0, 1.0]))
    with pytest.warns(UserWarning, match="1 of 2 eigenvectors of the eigenvalue 3 were chosen"):
        local_energy(twice, groups, f)
    assert local_energy(twice, groups, energy=0.6).energy.tolist() == [1, 1, 0, 0]
    assert local_energy(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), groups, f).energy.tolist() == [1, 0, 0, 0]


def test_bad_input_of_local_energy() -> None:
    kernel, groups = _block_kernel()
    with pytest.raises(ValueError, match=r"K: expected shape \[n, n\], got \(6, 5\)"):
        local_energy(kernel[:, :5], groups)
    with pytest.raises(ValueError, match="K: expected a finite symmetric matrix"):
        local_energy(kernel.triu(), groups)
    with pytest.raises(TypeError, match=r"groups: expected integers, got torch\.float32"):
        local_energy(kernel, torch.zeros(6))
    with pytest.raises(ValueError, match=r"K: expected shape \[n, n\], got \(\)"):
        local_energy(torch.tensor(1.0), groups)
    with pytest.raises(ValueError, match=r"groups: expected 6 numbers from 0, got \(5,\)"):
        local_energy(kernel, groups[:5])
    with pytest.raises(ValueError, match=r"f: expected shape \(6,\), got \(5,\)"):
        local_energy(kernel, groups, torch.ones(5))
    with pytest.raises(ValueError, match="expected something to choose eigenvectors by"):
        local_energy(kernel, groups, torch.zeros(6))
    with pytest.raises(ValueError, match="energy: expected above 0 and at most 1, got 0"):
        local_energy(kernel, groups, energy=0)
