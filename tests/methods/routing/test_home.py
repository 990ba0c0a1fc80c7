"""HoME: its hierarchy, its experts and its baselines, against formulas written out here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.methods.routing.home import CGC, PLE, HoME, HoMEExpert, MMoE, multi_task_loss
from taskloom.methods.routing.home.experts import ExpertPool
from taskloom.methods.routing.home.ranking import RATES, TASKS, Teachers, auc
from taskloom.methods.threads import one_thread

TWO = {"watch": ["a", "b"], "inter": ["c", "d", "e"]}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    with one_thread():
        yield


def _rows(rows: int = 16, features: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _small(**options: object) -> HoME:
    torch.manual_seed(0)
    return HoME(7, TWO, 6, (2, 1), (3, 2), 1, (4,), rank=2, **options)


def _randomised(model: nn.Module) -> nn.Module:
    """Feature gates that are not the identity, and running statistics that are not those of a fresh model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.3 * torch.randn(one.shape, generator=generator, dtype=one.dtype))
        for name, one in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                one.add_(torch.rand(one.shape, generator=generator, dtype=one.dtype))
    return model


def _gate_of(feature_gate: nn.Module, x: Tensor) -> Tensor:
    """The feature gate by its formula."""
    weight = torch.softmax(feature_gate.mix(x), 1)
    maps = [2 * torch.sigmoid(x @ down @ up) for down, up in zip(feature_gate.down, feature_gate.up, strict=True)]
    return x * sum(weight[:, place, None] * one for place, one in enumerate(maps))


def _experts(pool: ExpertPool, place: int, x: Tensor) -> list[Tensor]:
    """A group's experts, one after the other, in eval mode."""
    if pool.gates is not None:
        x = _gate_of(pool.gates[place], x)
    layer, norm = pool.experts[place].layers[0], pool.experts[place].norm
    found = []
    for expert, (weight, bias) in enumerate(zip(layer.weight, layer.bias, strict=True)):
        z = x @ weight.T + bias
        z = (z - norm.running_mean[expert]) / torch.sqrt(norm.running_var[expert] + 1e-5) * norm.weight[expert] + norm.bias[expert]
        found.append(F.silu(z))
    return found


def _rows_of_gate(level: nn.Module) -> Callable[[int, bool], Tensor]:
    """The rows of the gate's weights for a gate, ``[experts it reads, features]``."""
    gate = level.gate
    first = gate.weight[: int(gate.mask.sum())].split(gate.mask.sum(1).tolist())
    own = gate.weight[int(gate.mask.sum()) :].split(gate.self_mask.sum(1).tolist())
    return lambda place, is_own: (own if is_own else first)[place]


def _weighted(weights: Tensor, experts: list[Tensor]) -> Tensor:
    return sum(weights[:, place, None] * one for place, one in enumerate(experts))


def _self_gate(rows: Tensor, x: Tensor, experts: list[Tensor]) -> Tensor:
    said = x @ rows.T
    return _weighted(torch.sigmoid(said) if len(experts) == 1 else torch.softmax(said, 1), experts)


def test_home_is_the_formula_of_the_paper() -> None:
    model = _randomised(_small().double()).eval()
    x = _rows(dtype=torch.float64)
    pool1, pool2 = model.level1.pool, model.level2.pool
    z = [_experts(pool1, place, x) for place in range(3)]
    rows = _rows_of_gate(model.level1)
    m = [
        _weighted(torch.softmax(x @ rows(0, False).T, 1), [*z[0], *z[1]]) + _self_gate(rows(0, True), x, z[1]),
        _weighted(torch.softmax(x @ rows(1, False).T, 1), [*z[0], *z[2]]) + _self_gate(rows(1, True), x, z[2]),
        _weighted(torch.softmax(x @ rows(2, False).T, 1), [*z[0], *z[1], *z[2]]) + _self_gate(rows(2, True), x, z[0]),
    ]
    category = [0, 0, 1, 1, 1]
    z2 = [_experts(pool2, place, given) for place, given in enumerate([m[2], m[0], m[1], *(m[one] for one in category)])]
    rows = _rows_of_gate(model.level2)
    said = model(x)
    for place, (task, one) in enumerate(zip("abcde", category, strict=True)):
        u = torch.cat([m[one], m[2]], 1)
        own = z2[3 + place]
        h = _weighted(torch.softmax(u @ rows(place, False).T, 1), [*z2[0], *z2[1 + one], *own]) + _self_gate(rows(place, True), u, own)
        torch.testing.assert_close(said[task], model.towers.layers[place](h)[:, 0], rtol=1e-9, atol=1e-9)


def test_one_category_with_all_experts_read_is_a_two_level_mmoe() -> None:
    torch.manual_seed(1)
    model = HoME(7, {"all": ["a", "b"]}, 6, (2, 2), (3, 1), 0, (4,), feature_gate=False, self_gate=False).eval()
    x = _rows()
    first, second = model.level1, model.level2

    def mmoe(level: nn.Module, inputs: list[Tensor], gate_input: Tensor) -> Tensor:
        experts = torch.stack([one for place, given in enumerate(inputs) for one in _experts(level.pool, place, given)], 1)
        weights = torch.softmax((gate_input @ level.gate.weight.T).unflatten(1, (level.gate.n_gates, -1)), 2)
        return torch.einsum("bge,bed->bgd", weights, experts)

    category, shared = mmoe(first, [x, x], x).unbind(1)
    features = mmoe(second, [shared, category], torch.cat([category, shared], 1))
    said = model(x)
    for place, task in enumerate("ab"):
        torch.testing.assert_close(said[task], model.towers.layers[place](features[:, place])[:, 0], rtol=1e-5, atol=1e-5)


def test_a_call_makes_no_tensor_from_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would wait for the copy."""
    model = _small().eval()
    expected = model(_rows())
    x = _rows()
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: pytest.fail("torch.tensor in a call"))
    assert all(torch.equal(said, expected[task]) for task, said in model(x).items())


def test_other_categories_get_no_gradient_in_level_two() -> None:
    model = _randomised(_small())
    model(_rows())["a"].sum().backward()
    pool = model.level2.pool
    for name, experts in zip(pool.groups, pool.experts, strict=True):
        reached = {bool(one.grad.any()) for one in experts.parameters() if one.grad is not None}
        assert reached == {name in {"shared", "category watch", "task a"}}, name
    first = dict(zip(model.level1.pool.groups, model.level1.pool.experts, strict=True))
    assert bool(first["category inter"].layers[0].weight.grad.any())  # by way of the shared gate


def test_without_shared_gate_path_the_other_category_gets_nothing() -> None:
    model = _randomised(_small())
    meta = model.level1([_rows()] * 3, _rows())
    meta[:, 0].sum().backward()
    other = dict(zip(model.level1.pool.groups, model.level1.pool.experts, strict=True))["category inter"]
    assert not any(bool(one.grad.any()) for one in other.parameters() if one.grad is not None)


def test_experts_are_normalised_in_training_and_independent_of_the_batch_in_eval() -> None:
    expert = HoMEExpert(7, 5)
    x = _rows(64)
    seen: list[Tensor] = []
    expert.stacked.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    y = expert(x)
    z = seen[0][:, 0]
    normal = (z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5)
    torch.testing.assert_close(normal.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.var(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(y, F.silu(normal), atol=1e-5, rtol=1e-5)
    expert.eval()
    torch.testing.assert_close(expert(x)[:3], expert(x[:3]), atol=1e-6, rtol=1e-6)


def test_two_layers_of_stacked_experts_are_those_of_single_ones() -> None:
    pool = ExpertPool({"one": 2, "two": 3}, 7, 5, (6, 4), norm=None, activation="relu")
    x, other = _rows(), _rows(seed=1)
    z = pool([x, other])
    for place, (given, experts) in enumerate(zip((x, other), pool.experts, strict=True)):
        for expert, at in enumerate(range(*pool.columns(("one", "two")[place]).indices(5))):
            layers = [layer for stacked in experts.layers for layer in (_linear(stacked.weight[expert], stacked.bias[expert]), nn.ReLU())]
            torch.testing.assert_close(z[:, at], nn.Sequential(*layers)(given), rtol=1e-5, atol=1e-5)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("norm", ["batch", "layer", None])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_every_kind_of_expert_trains(norm: str | None, activation: str) -> None:
    model = _small(norm=norm, activation=activation, hidden=(5,))
    said = model(_rows())
    assert list(said) == ["a", "b", "c", "d", "e"]
    multi_task_loss(said, {task: (one > 0).float().detach() for task, one in said.items()}).backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in model.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda: MMoE(7, ["a", "b", "c"], 6, 4, (4,)),
        lambda: MMoE(7, ["a", "b", "c"], 6, 4, (4,), one_gate=True),
        lambda: CGC(7, ["a", "b", "c"], 6, 2, 1, (4,)),
        lambda: PLE(7, ["a", "b", "c"], 6, 2, 2, (4,), levels=3),
    ],
)
def test_baselines_are_sums_over_the_experts_that_their_gates_read(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(2)
    model = build()
    x = _rows()
    inputs, said = None, x
    for level in [model.level] if isinstance(model, MMoE) else model.levels:
        pool, gate = level.pool, level.gate
        given = [x] * len(pool.groups) if inputs is None else inputs
        z = torch.cat([F.relu(experts.layers[0](one)) for experts, one in zip(pool.experts, given, strict=True)], 1)
        if said.dim() == 3:
            said = said[:, : gate.n_gates]
        logits = gate.logits(said)[:, 0].masked_fill(~gate.mask, -math.inf)
        said = torch.softmax(logits, 2) @ z
        inputs = said.unbind(1)
    tasks = said.expand(-1, 3, -1) if said.shape[1] == 1 else said
    for place, (task, got) in enumerate(model(x).items()):
        assert task == "abc"[place]
        torch.testing.assert_close(got, model.towers.layers[place](tasks[:, place])[:, 0], rtol=1e-5, atol=1e-5)


def test_cgc_tasks_do_not_reach_each_other() -> None:
    model = CGC(7, ["a", "b"], 6, 2, 1, (4,))
    model(_rows())["a"].sum().backward()
    pool = model.levels[0].pool
    reached = {name: bool(experts.layers[0].weight.grad.any()) for name, experts in zip(pool.groups, pool.experts, strict=True)}
    assert reached == {"a": True, "b": False, "shared": True}


def test_gate_report_says_what_the_gates_and_experts_do() -> None:
    model = _randomised(_small(norm=None, activation="relu")).eval()
    with torch.no_grad():
        model.level1.pool.experts[1].layers[0].weight[1].zero_()
        model.level1.pool.experts[1].layers[0].bias[1].fill_(-1)
    x = _rows(50)
    report = model.gate_report(x)
    first, second = report["level1"], report["level2"]
    assert first.gates == ("category watch", "category inter", "shared")
    assert first.experts[:3] == ("shared 0", "shared 1", "category watch 0")
    torch.testing.assert_close(first.weight.sum(1), torch.ones(3))
    assert not first.weight[0, 5:].any()
    z = model.level1.pool([x] * 3)
    torch.testing.assert_close(first.zero_fraction, (z == 0).float().mean((0, 2)))
    assert first.zero_fraction[3] == 1
    torch.testing.assert_close(first.std, z.transpose(0, 1).flatten(1).std(1))
    assert second.gates == tuple("abcde")
    assert second.weight.shape == (5, 1 + 2 * 2 + 5)
    assert (second.entropy <= math.log(4) + 1e-6).all()


def test_shared_parameters_are_those_that_several_tasks_train() -> None:
    model = _randomised(_small())
    shared = {id(one) for one in model.get_share_params()}
    trained: dict[int, int] = {}
    for task in "abcde":
        model.zero_grad(set_to_none=True)
        model(_rows())[task].sum().backward()
        for one in model.parameters():
            trained[id(one)] = trained.get(id(one), 0) + (one.grad is not None and bool(one.grad.any()))
    assert shared == {one for one, tasks in trained.items() if tasks > 1}


def test_a_model_is_saved_copied_and_compiled() -> None:
    model = _randomised(_small()).eval()
    x = _rows()
    fresh = _small().eval()
    fresh.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for other in (fresh, copy.deepcopy(model), compiled):
        for task, said in other(x).items():
            assert torch.equal(said, model(x)[task])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "build", [_small, lambda: CGC(7, ["a", "b"], 6, 2, 1, (4,)), lambda: PLE(7, ["a", "b"], 6), lambda: MMoE(7, ["a", "b"], 6)]
)
def test_a_model_is_loaded_from_the_meta_device(build: Callable[[], nn.Module], assign: bool) -> None:
    model = _randomised(build()).eval()
    with torch.device("meta"):
        fresh = build().eval()
    if not assign:
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    for task, said in fresh(_rows()).items():
        assert torch.equal(said, model(_rows())[task])


def test_autocast_keeps_the_gates_in_single_precision() -> None:
    model = _randomised(_small()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        said = model(_rows())
    for task, one in model(_rows()).items():
        torch.testing.assert_close(said[task].float(), one, rtol=0.1, atol=0.1)


def test_loss_leaves_out_rows_without_a_label() -> None:
    logits = {"a": torch.tensor([0.3, -1.0, 2.0]), "b": torch.tensor([1.0, 1.0, 1.0], requires_grad=True)}
    labels = {"a": torch.tensor([1.0, math.nan, 0.0]), "b": torch.full((3,), math.nan)}
    expected = F.binary_cross_entropy_with_logits(logits["a"][[0, 2]], labels["a"][[0, 2]])
    loss = multi_task_loss(logits, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not logits["b"].grad.any()
    for wrong in (math.inf, -math.inf, math.nan):
        said = torch.tensor([0.3, wrong, 2.0], requires_grad=True)
        loss = multi_task_loss({"a": said}, {"a": labels["a"]})
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert said.grad is not None
        assert said.grad[1] == 0
        assert said.grad.isfinite().all()


def test_generated_tasks_have_their_rates() -> None:
    rows = Teachers().draw(20000, torch.Generator().manual_seed(3))
    for task, rate in RATES.items():
        assert float(rows.labels[task].mean()) == pytest.approx(rate, rel=0.15)
    assert set(rows.labels) == {task for tasks in TASKS.values() for task in tasks}


def test_area_under_the_curve_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    score, label = torch.randint(0, 9, (60,), generator=generator).float(), (torch.rand(60, generator=generator) < 0.3).float()
    pairs = score[label == 1][:, None] - score[label == 0][None]
    assert auc(score, label) == pytest.approx(float(((pairs > 0) + 0.5 * (pairs == 0)).double().mean()))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: HoME(7, {}, 6), ValueError, "tasks: expected at least one category"),
        (lambda: HoME(7, {"watch": []}, 6), ValueError, "at least one task for category 'watch'"),
        (lambda: HoME(7, {"watch": "ab"}, 6), ValueError, "got 'ab'"),
        (lambda: HoME(7, {"watch": ["a"], "inter": ["a"]}, 6), ValueError, "'a' in 'watch' and 'inter'"),
        (lambda: HoME(7, {"watch": ["a", "a"]}, 6), ValueError, "'a' twice in 'watch'"),
        (lambda: HoME(7, TWO, 0), ValueError, "expert_dim: expected at least 1, got 0"),
        (lambda: HoME(7, TWO, 6, n_shared=0), ValueError, "n_shared of level 1"),
        (lambda: HoME(7, TWO, 6, n_shared=1.5), TypeError, "expected an integer, got 1.5"),
        (lambda: HoME(7, TWO, 6, n_shared=(1, 2, 3)), ValueError, r"n_shared: .* one for each of 2 levels, got \(1, 2, 3\)"),
        (lambda: HoME(7, TWO, 6, tower_dims=(4, 0)), ValueError, r"tower_dims\[1\]: expected at least 1, got 0"),
        (lambda: MMoE(7, ["a"], 6)(_rows(4, 6)), ValueError, r"MMoE: x: expected shape \[B, 7\], got \(4, 6\)"),
        (lambda: PLE(7, ["a"], 6)(_rows(4, 6)), ValueError, r"PLE: x: expected shape \[B, 7\], got \(4, 6\)"),
        (lambda: MMoE(7, ["a"], 6).gate_report(torch.ones(4, 7).long()), TypeError, "MMoE: x: expected a floating .*int64"),
        (lambda: CGC(7, ["a"], 6)(torch.ones(4, 7).long()), TypeError, "CGC: x: expected a floating .*int64"),
        (lambda: HoME(7, TWO, 6, n_specific=0), ValueError, "n_specific: expected at least 1"),
        (lambda: HoME(7, TWO, 6, norm="group"), ValueError, "norm: expected one of 'batch', 'layer', None, got 'group'"),
        (lambda: HoME(7, TWO, 6, activation="gelu"), ValueError, "activation"),
        (lambda: HoME(7, TWO, 6, rank=0), ValueError, "rank: expected at least 1, got 0"),
        (lambda: HoME(7, TWO, 6, n_lora=0), ValueError, "n_lora: expected at least 1, got 0"),
        (lambda: HoMEExpert(7, 5, (0,)), ValueError, r"hidden\[0\]"),
        (lambda: MMoE(7, [], 6), ValueError, "MMoE: tasks"),
        (lambda: PLE(7, ["a", "a"], 6), ValueError, "PLE: tasks"),
        (lambda: PLE(7, ["shared"], 6), ValueError, "'shared' is the name of the shared experts"),
        (lambda: HoMEExpert(7, 5)(_rows(1)), ValueError, "at least two rows"),
        (lambda: _small()(_rows(4, 6)), ValueError, r"x: expected shape \[B, 7\], got \(4, 6\)"),
        (lambda: _small()(torch.zeros(4, 7, dtype=torch.int64)), TypeError, "got torch.int64"),
        (lambda: multi_task_loss({}, {}), ValueError, "logits: expected at least one task"),
        (
            lambda: multi_task_loss({"a": torch.zeros(2)}, {"a": torch.tensor([1, -1])}),
            ValueError,
            r"labels\['a'\]: expected 0, 1 or NaN",
        ),
        (lambda: multi_task_loss({"a": torch.zeros(2)}, {"b": torch.zeros(2)}), ValueError, r"expected tasks \['a'\], got \['b'\]"),
        (lambda: multi_task_loss({"a": torch.zeros(2)}, {"a": torch.zeros(2, 1)}), ValueError, r"labels\['a'\]: expected shape \(2,\)"),
    ],
)
def test_bad_input_is_refused(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
