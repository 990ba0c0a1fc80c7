"""Reversible model merging: what its card promises."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from taskloom.methods.merging.rmm import RMMLinear, RMMSpace, fit_rmm, from_checkpoints, from_peft, merge_products, merge_separate
from taskloom.methods.merging.rmm.fit import Factors
from taskloom.methods.merging.rmm.space import product_error
from taskloom.nn import LowRankConfig, inject, save_adapter

Adapters = dict[str, dict[str, Factors]]
F32 = torch.float32
SIZES = {"up": (7, 5), "down": (5, 9)}


def _adapters(tasks: int = 5, rank: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> Adapters:
    generator = torch.Generator().manual_seed(seed)

    def factors(m: int, d: int) -> Factors:
        shapes = ((m, rank), (rank, d))
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
        return a, b

    return {f"t{task}": {layer: factors(*size) for layer, size in SIZES.items()} for task in range(tasks)}


def _error(got: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("tasks", "rank"), [(3, 4), (6, 4), (5, 4)])
@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_all_directions_are_exact(dtype: torch.dtype, bound: float, tasks: int, rank: int) -> None:
    adapters = _adapters(tasks, rank, dtype)
    space = fit_rmm(adapters, p=min(rank, tasks - 1), dtype=dtype)
    for task, adapter in adapters.items():
        for layer, (a, b) in adapter.items():
            got = space.factors(task, layer)
            assert _error(got[0], a) <= bound
            assert _error(got[1], b) <= bound
            assert _error(space.delta(task, layer), a @ b) <= bound


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_squared_error_is_that_of_the_discarded_singular_values() -> None:
    adapters = _adapters(6, 4)
    errors = []
    for p in (1, 2, 3, 4):
        space = fit_rmm(adapters, p=p, dtype=torch.float64)
        got = torch.stack([space.factors(task, "up")[0] for task in adapters])
        own = torch.stack([adapter["up"][0] for adapter in adapters.values()])
        values = torch.linalg.svdvals((own - own.mean(0)).transpose(0, 1))
        errors.append(float((got - own).square().sum()))
        assert errors[-1] == pytest.approx(float(values[:, p:].square().sum()), rel=1e-9, abs=1e-20)
    assert all(later <= earlier for earlier, later in pairwise(errors))


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_no_other_basis_does_better() -> None:
    adapters = _adapters(6, 4)
    space = fit_rmm(adapters, p=2, dtype=torch.float64)
    own = torch.stack([adapter["up"][0] for adapter in adapters.values()])
    centred = own - own.mean(0)
    best = float((torch.stack([space.factors(task, "up")[0] for task in adapters]) - own).square().sum())
    for seed in range(20):
        basis, _ = torch.linalg.qr(torch.randn(7, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
        projected = torch.einsum("nqr,qrp,qsp->nqs", centred, basis, basis)
        assert float((projected - centred).square().sum()) >= best


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_bases_are_orthonormal_and_coefficients_sum_to_nothing() -> None:
    space = fit_rmm(_adapters(6, 4), p=3, dtype=torch.float64)
    for positions in (part for layer in space.layers.values() for part in (layer.a, layer.b)):
        identity = torch.eye(3, dtype=torch.float64).expand(len(positions.basis), 3, 3)
        torch.testing.assert_close(positions.basis @ positions.basis.mT, identity)
        torch.testing.assert_close(positions.coefficients.sum(0), torch.zeros_like(positions.coefficients[0]))
        largest = positions.basis.gather(2, positions.basis.abs().argmax(2, keepdim=True))
        assert (largest > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_identical_adapters_need_no_direction(dtype: torch.dtype) -> None:
    one = _adapters(1, 4, dtype)["t0"]
    space = fit_rmm({"a": one, "b": one, "c": one}, p=1, dtype=dtype)
    for layer, (a, b) in one.items():
        assert torch.equal(space.layers[layer].a.coefficients, torch.zeros_like(space.layers[layer].a.coefficients))
        torch.testing.assert_close(space.delta("b", layer), a @ b)
    assert max(space.reconstruction_error().values()) < 1e-6


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_a_common_change_of_gauge_alters_nothing_and_an_own_one_does() -> None:
    adapters = _adapters(5, 4)
    gauge, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))
    common = {task: {layer: (a @ gauge, gauge.T @ b) for layer, (a, b) in one.items()} for task, one in adapters.items()}
    own = {**adapters, "t0": common["t0"]}
    plain, turned, mixed = (fit_rmm(one, p=2, dtype=torch.float64) for one in (adapters, common, own))
    for task in adapters:
        assert _error(turned.delta(task, "up"), plain.delta(task, "up")) < 1e-5
    assert _error(mixed.delta("t1", "up"), plain.delta("t1", "up")) > 1e-3


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_storage_is_what_the_formula_says(p: int, tmp_path: Path) -> None:
    adapters = _adapters(8, 16, torch.float32)
    space = fit_rmm(adapters, p=p)
    for layer, (m, d) in SIZES.items():
        assert space.layers[layer].a.numbers + space.layers[layer].b.numbers == (m + d) * (p * (16 + 8) + 16)
    assert space.storage_ratio == pytest.approx((p * (16 + 8) + 16) / (16 * 8))
    big = {task: {"w": (torch.randn(400, 16), torch.randn(16, 300))} for task in adapters}
    fit_rmm(big, p=p).save(tmp_path / "space.safetensors")
    own = sum(factor.nbytes for one in big.values() for factors in one.values() for factor in factors)
    assert (tmp_path / "space.safetensors").stat().st_size / own == pytest.approx(space.storage_ratio, rel=0.02)


def test_default_p_stores_at_most_half() -> None:
    space = fit_rmm(_adapters(8, 16, torch.float32))
    assert (space.p, space.storage_ratio) == (2, 0.5)
    assert fit_rmm(_adapters(8, 16, torch.float32), storage=0.7).p == 3


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_save_and_load_give_the_same_space(tmp_path: Path) -> None:
    space = fit_rmm(_adapters(4, 4), p=2)
    space.save(tmp_path / "space.safetensors")
    read = RMMSpace.load(tmp_path / "space.safetensors")
    assert read.tasks == space.tasks
    assert read.reconstruction_error("t1") == space.reconstruction_error("t1")
    assert all(torch.equal(read.delta(task, "up"), space.delta(task, "up")) for task in space.tasks)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a file of format"):
        RMMSpace.load(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "part.safetensors", metadata={"format": "taskloom-rmm-1", "errors": '{"up": []}'})
    (tmp_path / "text.safetensors").write_text("no tensors in here")
    for name in ("part", "text"):
        with pytest.raises(ValueError, match=rf"{name}.safetensors: not a space that was saved"):
            RMMSpace.load(tmp_path / f"{name}.safetensors")


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_text("half")
        raise OSError("No space left on device")

    space = fit_rmm(_adapters(3), p=1)
    monkeypatch.setattr("taskloom.methods.merging.rmm.space.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        space.save(tmp_path / "space.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_peft_files_go_in_and_come_out(tmp_path: Path) -> None:
    adapters = _adapters(3, 4, torch.float32)
    for task, one in adapters.items():
        (tmp_path / task).mkdir()
        state = {f"base_model.model.{layer}.lora_A.weight": b for layer, (a, b) in one.items()}
        state |= {f"base_model.model.{layer}.lora_B.weight": (a / 2).contiguous() for layer, (a, b) in one.items()}
        save_file(state, tmp_path / task / "adapter_model.safetensors")
        (tmp_path / task / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    read = from_peft([tmp_path / task for task in adapters])
    assert list(read) == list(adapters)
    space = fit_rmm(read, p=2)
    space.save_adapter("t2", tmp_path / "out")
    back = from_peft({"t2": tmp_path / "out"})["t2"]
    for layer in SIZES:
        torch.testing.assert_close(read["t2"][layer][0] @ read["t2"][layer][1], adapters["t2"][layer][0] @ adapters["t2"][layer][1])
        torch.testing.assert_close(back[layer][0] @ back[layer][1], space.delta("t2", layer))


@pytest.mark.parametrize(("config", "factor"), [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 8, "use_rslora": True}, 4.0), ({}, 1.0)])
def test_scaling_is_folded_in(config: dict[str, object], factor: float) -> None:
    b, a = torch.randn(4, 9), torch.randn(7, 4)
    state = {"base_model.model.w.lora_A.weight": b, "base_model.model.w.lora_B.weight": a}
    (read,) = from_peft({"t": state}, **config).values()
    torch.testing.assert_close(read["w"][0], factor * a)


def test_ranks_and_alphas_by_pattern_are_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
    inject(model, LowRankConfig(target_modules=["0", "1"], r=2, lora_alpha=2, alpha_pattern={"1": 6.0}, rank_pattern={"1": 3}))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    (read,) = from_peft([tmp_path]).values()
    for layer in ("0", "1"):
        torch.testing.assert_close(read[layer][0] @ read[layer][1], model.get_submodule(layer).delta_weight("default"))


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_a_task_can_be_added_by_projection() -> None:
    adapters = _adapters(5, 4)
    space = fit_rmm({task: adapters[task] for task in ("t0", "t1", "t2", "t3")}, p=2, dtype=torch.float64)
    before = space.delta("t1", "up")
    errors = space.add_task("t4", adapters["t4"])
    assert torch.equal(space.delta("t1", "up"), before)
    assert errors["up"] == pytest.approx(_error(space.delta("t4", "up"), adapters["t4"]["up"][0] @ adapters["t4"]["up"][1]), rel=1e-6)
    again = fit_rmm({task: adapters[task] for task in ("t0", "t1", "t2", "t3")}, p=2, dtype=torch.float64)
    again.add_task("copy", adapters["t2"])
    torch.testing.assert_close(again.delta("copy", "down"), again.delta("t2", "down"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_a_mixed_batch_is_served_as_each_task_alone(dtype: torch.dtype) -> None:
    adapters = _adapters(5, 4, dtype)
    space = fit_rmm(adapters, p=2, dtype=dtype)
    base = nn.Linear(9, 5, dtype=dtype)
    layer = RMMLinear(base, space, "down")
    x, task = torch.randn(11, 9, dtype=dtype), torch.tensor([0, 4, 2, 2, 1, 0, 3, 4, 4, 1, 2])
    y = layer(x, task)
    for row, place in enumerate(task.tolist()):
        expected = base(x[row]) + space.delta(f"t{place}", "down") @ x[row]
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(x[row], place), y[row], rtol=1e-4, atol=1e-4)
    layer.set_task("t3")
    torch.testing.assert_close(layer(x), layer(x, 3))
    sequences = torch.randn(3, 4, 9, dtype=dtype)
    chosen = torch.tensor([2, 0, 2])
    torch.testing.assert_close(layer(sequences, chosen)[1], layer(sequences[1], 0), rtol=1e-4, atol=1e-4)
    order = torch.tensor([3, 0, 2, 1])
    torch.testing.assert_close(layer(x[order], task[order]), y[order])


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_gradients_reach_x() -> None:
    layer = RMMLinear(nn.Linear(9, 5, dtype=torch.float64), fit_rmm(_adapters(3, 4), p=1, dtype=torch.float64), "down")
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: layer(rows, torch.tensor([0, 2, 1, 2])), (x,))


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_a_kept_reconstruction_follows_the_module() -> None:
    first, second = (RMMLinear(nn.Linear(9, 5), fit_rmm(_adapters(3, 4, F32, seed), p=1), "down") for seed in (0, 1))
    x = torch.randn(4, 9, requires_grad=True)
    with torch.inference_mode():
        first(x, 1)
    first(x, 1).sum().backward()
    assert x.grad is not None
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(x, 1), second(x, 1))
    assert first.double()(x.double(), 1).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_under_autocast_it_is_a_linear_layer() -> None:
    layer = RMMLinear(nn.Linear(9, 5), fit_rmm(_adapters(3, 4, F32), p=1), "down")
    x = torch.randn(4, 9)
    for task in (1, torch.tensor([0, 2, 1, 2])):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, task)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x, task), rtol=3e-2, atol=3e-1)


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_types_may_differ_between_tasks() -> None:
    adapters = _adapters(3, 4, F32)
    a, b = adapters["t0"]["up"]
    mixed = _with(adapters, "t0", "up", (a.bfloat16(), b.bfloat16()))
    assert fit_rmm(mixed, p=2).layers["up"].a.mean.dtype == F32
    assert (
        fit_rmm({task: {layer: (a.half(), b.half()) for layer, (a, b) in one.items()} for task, one in adapters.items()}, p=1)
        .layers["up"]
        .b.basis.dtype
        == torch.float16
    )


def test_checkpoints_that_are_not_finite() -> None:
    base = {"w.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"tuned: task 'a': 'w.weight' differs from the base by values that are not finite"):
        from_checkpoints(base, {"a": {"w.weight": torch.full((4, 4), torch.nan)}}, 2)
    with pytest.raises(TypeError, match="rank: expected an integer, got float"):
        from_checkpoints(base, {"a": {"w.weight": torch.ones(4, 4)}}, 2.0)


def test_checkpoints_are_cut_to_a_rank(tmp_path: Path) -> None:
    base = {"w.weight": torch.randn(6, 8), "w.bias": torch.randn(6), "same.weight": torch.randn(3, 3)}
    low = torch.randn(6, 2) @ torch.randn(2, 8)
    tuned = {"a": {**base, "w.weight": base["w.weight"] + low}, "b": {**base, "w.weight": base["w.weight"] - low}}
    save_file(tuned["a"], tmp_path / "a.safetensors")
    adapters = from_checkpoints(base, {"a": tmp_path / "a.safetensors", "b": tuned["b"]}, 2)
    assert list(adapters["a"]) == ["w"]
    a, b = adapters["a"]["w"]
    torch.testing.assert_close(a @ b, low, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.T @ a, b @ b.T, rtol=1e-4, atol=1e-4)


def test_error_of_a_product_needs_no_product() -> None:
    own, other = _adapters(2, 4)["t0"]["up"], _adapters(2, 4)["t1"]["up"]
    assert product_error(own, other) == pytest.approx(_error(other[0] @ other[1], own[0] @ own[1]), rel=1e-9)
    assert product_error(own, own) < 1e-7


def test_baselines() -> None:
    adapters = _adapters(3, 4, torch.float32)
    summed = merge_separate(adapters, weight=0.5)["up"]
    torch.testing.assert_close(summed[0], 0.5 * sum(one["up"][0] for one in adapters.values()))
    torch.testing.assert_close(merge_products(adapters, 2.0)["up"], 2.0 * sum(one["up"][0] @ one["up"][1] for one in adapters.values()))
    assert (merge_separate(adapters, "ties", density=0.5)["up"][0] == 0).any()
    dropped = merge_separate(adapters, "dare", density=0.5, seed=1)["up"][0]
    assert torch.equal(dropped, merge_separate(adapters, "dare", density=0.5, seed=1)["up"][0])
    with pytest.raises(ValueError, match="method: expected"):
        merge_separate(adapters, "median")
    for merge in (merge_separate, merge_products):
        with pytest.raises(ValueError, match="adapters: expected at least one task, got none"):
            merge({})
        with pytest.raises(ValueError, match=r"adapters: task 't1': expected the layers up, down, got up"):
            merge({**adapters, "t1": {"up": adapters["t1"]["up"]}})


def _with(adapters: Adapters, task: str, layer: str, factors: Factors) -> Adapters:
    return {**adapters, task: {**adapters[task], layer: factors}}


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        (_adapters(1), {}, "at least 2 tasks, got 1"),
        (_adapters(3), {"p": 0}, "p: expected 1 to 2, .*, got 0"),
        (_adapters(3), {"p": 3}, "p: expected 1 to 2, .*, got 3"),
        (_adapters(8, 16), {"storage": 0.3}, "storage: expected at least 0.3125, which p = 1 takes, got 0.3"),
        (_adapters(3), {"p": 1, "storage": 0.5}, "expected nothing where p is given"),
        ({**_adapters(2), "t2": {"up": _adapters(1)["t0"]["up"]}}, {}, "task 't2': expected the layers up, down, got up"),
        (
            _with(_adapters(2), "t1", "up", (torch.ones(7, 3), torch.ones(3, 5))),
            {},
            "one rank .* t0 4, t1 3; pad_rank",
        ),
        (_with(_adapters(2), "t1", "up", (torch.ones(7, 4), torch.ones(4, 6))), {}, r"layer 'up': expected one size \(m, d\)"),
        (_with(_adapters(2), "t1", "up", (torch.full((7, 4), torch.inf), torch.ones(4, 5))), {}, "task 't1': layer 'up': A holds"),
    ],
)
def test_bad_adapters(adapters: Adapters, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_rmm(adapters, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p": 1.0}, TypeError, "p: expected an integer, got float"),
        ({"p": True}, TypeError, "p: expected an integer, got bool"),
        ({"storage": "half"}, TypeError, "storage: expected a number, got str"),
        ({"storage": math.nan}, ValueError, "storage: expected at least .*, got nan"),
        ({"p": 1, "dtype": torch.float16}, ValueError, "dtype: expected float32 or float64, got torch.float16"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_rmm(_adapters(3), **options)


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_factors_of_integers_or_nan() -> None:
    space = fit_rmm(_adapters(3), p=1)
    for value, error in ((torch.ones(7, 4, dtype=torch.int64), TypeError), (torch.full((7, 4), torch.nan), ValueError)):
        adapters = _with(_adapters(3), "t1", "up", (value, torch.ones(4, 5)))
        with pytest.raises(error, match="task 't1': layer 'up': A"):
            fit_rmm(adapters)
        with pytest.raises(error, match="adapter: layer 'up': A"):
            space.add_task("new", adapters["t1"])
    assert space.tasks == ["t0", "t1", "t2"]


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_smaller_ranks_can_be_filled_up() -> None:
    adapters = _with(_adapters(2), "t1", "up", (torch.randn(7, 3).double(), torch.randn(3, 5).double()))
    space = fit_rmm(adapters, p=1, pad_rank=True, dtype=torch.float64)
    a, b = adapters["t1"]["up"]
    torch.testing.assert_close(space.delta("t1", "up"), a @ b)


def test_a_space_that_saves_nothing_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"p = 1 stores 1\.25 times what the adapters themselves take"):
        fit_rmm(_adapters(2), p=1)


@pytest.mark.parametrize(
    ("state", "config", "error", "message"),
    [
        ({"base_model.model.w.lora_A.weight": torch.ones(2, 3)}, {}, ValueError, "layer 'w' has lora_A.weight alone"),
        ({"base_model.model.w.lora_magnitude_vector": torch.ones(2)}, {}, ValueError, "belongs to DoRA, which is refused"),
        ({"base_model.model.w.hada_w1_a": torch.ones(2)}, {}, TypeError, "expected only LoRA factors"),
    ],
)
def test_other_adapters_are_refused(state: dict[str, Tensor], config: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_peft({"t": state})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"peft_type": "IA3"}, TypeError, "expected a LoRA adapter, got IA3"),
        ({"peft_type": "LORA", "bias": "all"}, ValueError, "bias='all'"),
        ({"peft_type": "LORA", "use_dora": True}, ValueError, "DoRA"),
    ],
)
def test_other_configs_are_refused(config: dict[str, object], error: type[Exception], message: str, tmp_path: Path) -> None:
    save_file({"base_model.model.w.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        from_peft([tmp_path])


@pytest.mark.filterwarnings("ignore:fit_rmm")
def test_unknown_names() -> None:
    space = fit_rmm(_adapters(3), p=1)
    with pytest.raises(KeyError, match="task: 'x' is unknown"):
        space.delta("x", "up")
    with pytest.raises(KeyError, match="layer: 'x' is unknown"):
        space.delta("t0", "x")
    with pytest.raises(ValueError, match="expected 9 in and 5 out features as layer 'down', got 4 and 5"):
        RMMLinear(nn.Linear(4, 5), space, "down")
    layer = RMMLinear(nn.Linear(9, 5), space, "down")
    with pytest.raises(TypeError, match="task: expected a task's place or a tensor of them, got str"):
        layer(torch.ones(2, 9), "t0")
    with pytest.raises(ValueError, match="none was given and set_task was not called"):
        layer(torch.ones(2, 9))
    with pytest.raises(IndexError, match="below 3, got 3"):
        layer(torch.ones(2, 9), 3)
    with pytest.raises(ValueError, match="'t1' is there already"):
        space.add_task("t1", _adapters(3)["t1"])
