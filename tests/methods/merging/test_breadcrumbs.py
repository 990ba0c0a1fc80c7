"""Model Breadcrumbs: what its card promises, invariant by invariant, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from breadcrumbs_models import FLOAT_NAMES, SHAPES, STEPS, State, assert_same_bits, by_formula, models, sorted_mask
from torch import Tensor, nn

import taskloom
from taskloom.methods.merging.breadcrumbs import breadcrumbs_, breadcrumbs_mask, merge_breadcrumbs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYER = "model.layers.0.mlp.weight"

too_short = pytest.mark.filterwarnings("ignore:.*nothing")


def _delta(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values without a zero, in bfloat16 with many ties."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert values.all()
    return values


def _merge(base: State, tuned: list[State], **settings: Any) -> State:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merge_breadcrumbs: nothing")
        return merge_breadcrumbs(base, tuned, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.01), (0.29, 0.0), (0.9, 0.05), (1.0, 0.0), (0.07, 0.3)])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_invariant_1_counts_are_exact(density: float, gamma: float, granularity: Any, dtype: torch.dtype) -> None:
    delta = _delta(6, 100, dtype=dtype)
    length = 100 if granularity == "row" else 600
    rows = delta.reshape(-1, length)
    mask = breadcrumbs_mask(delta, density, gamma, granularity=granularity).reshape(rows.shape)
    expected = min(int(density * length), length - int(gamma * length))
    assert mask.sum(1).tolist() == [expected] * len(rows)


def test_invariant_1_shares_are_truncated_products() -> None:
    assert int(breadcrumbs_mask(_delta(100), 0.29, 0.0).sum()) == 28
    with pytest.warns(UserWarning, match=r"90 of 100 entries of a segment are kept, fewer than density 0.95 says"):
        assert int(breadcrumbs_mask(_delta(100), 0.95, 0.1).sum()) == 90


@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_2_without_gamma_it_is_magnitude_pruning(dtype: torch.dtype) -> None:
    delta = _delta(31, 33, dtype=dtype)
    assert breadcrumbs_mask(delta, 0.3, 0.0).equal(taskloom.magnitude_mask(delta, density=0.3))
    assert breadcrumbs_mask(delta, 0.3, 0.0).equal(sorted_mask(delta, 0, int(0.3 * delta.numel())))


def test_invariant_2_keeping_everything_is_task_arithmetic() -> None:
    base, tuned = models()
    weights = [0.3, 0.5, -0.2]
    merged = merge_breadcrumbs(base, tuned, weight=weights, density=1.0, gamma=0.0)
    for name in FLOAT_NAMES:
        everything = [torch.ones_like(base[name], dtype=torch.bool)] * 3
        assert merged[name].equal(by_formula(base[name], [one[name] for one in tuned], everything, weights))


@pytest.mark.parametrize("outliers_first", [True, False])
def test_invariant_3_rows_are_tensors_of_their_own(outliers_first: bool) -> None:
    delta = _delta(9, 130, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"density": 0.3, "gamma": 0.02, "outliers_first": outliers_first}
    rows = breadcrumbs_mask(delta, granularity="row", **settings)
    assert rows.equal(torch.stack([breadcrumbs_mask(row, **settings) for row in delta]))
    base, tuned = _delta(9, 130, seed=1), [_delta(9, 130, seed=seed) for seed in (2, 3)]
    merged = merge_breadcrumbs({"w": base}, [{"w": one} for one in tuned], granularity="row", **settings)
    for row in range(9):
        alone = merge_breadcrumbs({"w": base[row]}, [{"w": one[row]} for one in tuned], **settings)
        assert merged["w"][row].equal(alone["w"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [-1.0, 0.25, -8.0])
def test_invariant_4_scale_and_sign_change_no_mask(factor: float, dtype: torch.dtype) -> None:
    delta = _delta(40, 41, dtype=dtype)
    for granularity in ("tensor", "row"):
        mask = breadcrumbs_mask(delta, 0.2, 0.05, granularity=granularity)
        assert breadcrumbs_mask(factor * delta, 0.2, 0.05, granularity=granularity).equal(mask)


@too_short
def test_invariant_5_models_add_up() -> None:
    base, tuned = models(5)
    merged = merge_breadcrumbs(base, tuned, weight=0.3, gamma=0.05)
    singles = [merge_breadcrumbs(base, [one], weight=0.3, gamma=0.05) for one in tuned]
    for name in FLOAT_NAMES:
        added = base[name] + sum(single[name] - base[name] for single in singles)
        torch.testing.assert_close(merged[name], added, rtol=0, atol=2e-6)
        exact = base[name].double() + sum(single[name].double() - base[name].double() for single in singles)
        assert (merged[name].double() - exact).abs().max() <= 1e-6 if exact.numel() else True


@pytest.mark.parametrize("values", [torch.ones(101), torch.tensor([1.0, -1.0, 2.0, 2.0, -2.0]).repeat(30), _delta(999).bfloat16()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_6_of_equal_magnitudes_the_lower_index_is_larger(values: Tensor, dtype: torch.dtype) -> None:
    delta = values.to(dtype)
    begin, end = int(0.05 * delta.numel()), int(0.05 * delta.numel()) + int(0.33 * delta.numel())
    for backend in ("native", "reference"):
        with taskloom.backend(backend):
            assert breadcrumbs_mask(delta, 0.33, 0.05).equal(sorted_mask(delta, begin, end))


@too_short
def test_invariant_6_threads_change_nothing() -> None:
    base, tuned = models(4, torch.bfloat16, tied=True)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(merge_breadcrumbs(base, tuned, sign_consensus=True, normalize=True))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.gpu
@too_short
def test_invariant_6_a_gpu_gives_the_same_bits() -> None:
    base, tuned = models(3, torch.bfloat16, tied=True)
    for granularity in ("tensor", "row"):
        for name in FLOAT_NAMES:
            delta = tuned[0][name].float() - base[name].float()
            own = breadcrumbs_mask(delta.cuda(), 0.3, 0.05, granularity=granularity)
            assert own.cpu().equal(breadcrumbs_mask(delta, 0.3, 0.05, granularity=granularity))
        moved = [{name: value.cuda() for name, value in state.items()} for state in (base, *tuned)]
        merged = merge_breadcrumbs(moved[0], moved[1:], granularity=granularity)
        expected = merge_breadcrumbs(base, tuned, granularity=granularity)
        assert_same_bits({name: value.cpu() for name, value in merged.items()}, expected)


@too_short
def test_invariant_7_integers_stay_and_inputs_do_too() -> None:
    base, tuned = models()
    before = copy.deepcopy([base, *tuned])
    merged = merge_breadcrumbs(base, tuned)
    for state, old in zip([base, *tuned], before, strict=True):
        assert_same_bits(state, old)
    assert merged[STEPS].equal(base[STEPS])
    assert list(merged) == list(base)
    for tensor in merged.values():
        tensor.add_(1)
    for state, old in zip([base, *tuned], before, strict=True):
        assert_same_bits(state, old)


@too_short
def test_invariant_7_what_a_model_lacks_stays() -> None:
    base, tuned = models()
    del tuned[1]["model.norm.bias"]
    tuned[2]["model.more"] = torch.ones(3)
    with pytest.raises(KeyError, match=r"merge_breadcrumbs: finetuned\[1\] lacks 'model.norm.bias'; strict=False"):
        merge_breadcrumbs(base, tuned)
    with pytest.warns(
        UserWarning, match=r"finetuned\[1\] lacks 'model.norm.bias'; finetuned\[2\] has 'model.more', which base lacks: the 5"
    ):
        merged = merge_breadcrumbs(base, tuned, strict=False)
    assert merged["model.norm.bias"].equal(base["model.norm.bias"])
    assert merged["model.norm.bias"].data_ptr() != base["model.norm.bias"].data_ptr()
    assert list(merged) == list(base)
    assert merged[LAYER].equal(_merge({LAYER: base[LAYER]}, [{LAYER: one[LAYER]} for one in tuned])[LAYER])
    with pytest.raises(KeyError, match=r"finetuned\[0\] lacks"):
        merge_breadcrumbs(base, [{"other": torch.ones(2)}], strict=False)


@too_short
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("outliers_first", [True, False])
@pytest.mark.usefixtures("poisoned_memory")
def test_invariant_8_the_fused_merge_is_the_sorted_formula(dtype: torch.dtype, granularity: Any, outliers_first: bool) -> None:
    base, tuned = models(3, dtype, tied=dtype == torch.float32)
    weights, densities, gammas = [0.3, -0.7, 1.1], [0.3, 0.15, 0.6], [0.05, 0.0, 0.2]
    merged = merge_breadcrumbs(
        base, tuned, weight=weights, density=densities, gamma=gammas, granularity=granularity, outliers_first=outliers_first
    )
    for name, shape in SHAPES.items():
        length = (shape[-1] if shape else 1) if granularity == "row" else math.prod(shape)
        masks = []
        for one, density, gamma in zip(tuned, densities, gammas, strict=True):
            delta = one[name].float() - base[name].float()
            begin = int(gamma * length)
            end = begin + int(density * length) if outliers_first else max(begin, int(density * length))
            mask = sorted_mask(delta, begin, end, granularity == "row") if shape else torch.tensor(granularity == "row")
            masks.append(mask)
        assert merged[name].equal(by_formula(base[name], [one[name] for one in tuned], masks, weights)), name


@too_short
def test_float64_is_merged_in_float64() -> None:
    base, tuned = models(2, torch.float64)
    merged = merge_breadcrumbs(base, tuned, weight=0.3)
    for name, shape in SHAPES.items():
        begin, end = int(0.01 * math.prod(shape)), int(0.01 * math.prod(shape)) + int(0.15 * math.prod(shape))
        deltas = [one[name] - base[name] for one in tuned]
        kept = [torch.where(sorted_mask(delta, begin, end), delta, 0) if shape else torch.zeros_like(delta) for delta in deltas]
        assert merged[name].equal(base[name] + (0.3 * kept[0] + 0.3 * kept[1]))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_keeps_the_masks_entries(dtype: torch.dtype, granularity: Any) -> None:
    delta = _delta(50, 60, dtype=dtype)
    mask = breadcrumbs_mask(delta, granularity=granularity)
    expected = torch.where(mask, delta, 0)
    same = delta.t().contiguous().t()
    assert not same.is_contiguous()
    for target in (delta, same):
        assert breadcrumbs_(target, granularity=granularity) is target
        assert target.equal(expected)


def test_mergekits_rule_of_overflow() -> None:
    """As the card describes mergekit's magnitude_outliers, with the slice that was empty for n_top = 0 put right."""
    for length, density, gamma in [(100, 0.9, 0.2), (64, 0.9, 0.01), (64, 0.5, 0.0), (1000, 1.0, 0.3), (7, 0.9, 0.15), (64, 0.15, 0.01)]:
        delta = _delta(length)
        kept, top = int(density * length), int(gamma * length)
        bottom = length - kept - top
        if bottom < 0:
            top, bottom = top + bottom, 0
        ascending = delta.abs().argsort()
        expected = torch.zeros(length, dtype=torch.bool)
        expected[ascending[bottom : length - top]] = True
        assert breadcrumbs_mask(delta, density, gamma, on_overflow="density").equal(expected)
        assert int(expected.sum()) == kept


@pytest.mark.parametrize("on_overflow", ["drop", "density"])
def test_a_gamma_below_one_entry_removes_nothing(on_overflow: Any) -> None:
    delta = _delta(64)
    mask = breadcrumbs_mask(delta, 0.15, 0.01, on_overflow=on_overflow)
    assert mask.equal(sorted_mask(delta, 0, 9))
    base, tuned = {"bias": torch.zeros(64)}, [{"bias": delta}]
    assert merge_breadcrumbs(base, tuned, weight=1.0, on_overflow=on_overflow)["bias"].equal(torch.where(mask, delta, 0))


@pytest.mark.parametrize("on_overflow", ["drop", "density"])
def test_full_density_with_outliers(on_overflow: Any) -> None:
    delta = _delta(200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask = breadcrumbs_mask(delta, 1.0, 0.1, on_overflow=on_overflow)
    assert int(mask.sum()) == (180 if on_overflow == "drop" else 200)
    assert len(caught) == (1 if on_overflow == "drop" else 0)


def test_order_of_the_cuts() -> None:
    delta = _delta(1000)
    assert breadcrumbs_mask(delta, 0.3, 0.1, outliers_first=False).equal(sorted_mask(delta, 100, 300))
    assert breadcrumbs_mask(delta, 0.3, 0.1).equal(sorted_mask(delta, 100, 400))
    with pytest.warns(UserWarning, match="nothing is kept of segments of 1000 entries at density 0.1, gamma 0.3"):
        assert not breadcrumbs_mask(delta, 0.1, 0.3, outliers_first=False).any()


def test_pitfall_a_segment_that_keeps_nothing_warns() -> None:
    conv = {"conv": _delta(8, 4, 3, 3)}
    with pytest.warns(UserWarning, match=r"merge_breadcrumbs: nothing of a model's delta is kept in 1 tensors.*'conv'"):
        merged = merge_breadcrumbs({"conv": torch.zeros(8, 4, 3, 3)}, [conv], granularity="row")
    assert not merged["conv"].any()
    with pytest.warns(UserWarning, match=r"breadcrumbs_: nothing is kept of segments of 3 entries"):
        assert not breadcrumbs_(conv["conv"].clone(), granularity="row").any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge_breadcrumbs({"conv": torch.zeros(8, 4, 3, 3)}, [conv], granularity="row", density=0.34)["conv"].count_nonzero() == 96


def test_pitfall_rows_too_short_for_an_outlier_lose_none() -> None:
    delta = _delta(5, 128)
    assert breadcrumbs_mask(delta, 0.15, 0.006, granularity="row").equal(sorted_mask(delta, 0, 19, row=True))


def test_pitfall_bfloat16_is_subtracted_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4000, generator=generator).bfloat16()
    tuned = (base.float() + torch.randn(4000, generator=generator)).bfloat16()
    exact = tuned.float() - base.float()
    mask = sorted_mask(exact, 40, 640)
    assert not mask.equal(sorted_mask(tuned - base, 40, 640))
    merged = merge_breadcrumbs({"w": base}, [{"w": tuned}], weight=1.0)
    assert merged["w"].equal(by_formula(base, [tuned], [mask], [1.0]))


@too_short
def test_settings_of_each_tensor_and_model() -> None:
    base, tuned = models()

    def weight(name: str, model: int) -> float:
        return 0.5 if "mlp" in name else 0.1 * (model + 1)

    def density(name: str, model: int) -> float:
        return 0.5 if model == 0 else 0.25

    merged = merge_breadcrumbs(base, tuned, weight=weight, density=density, gamma=[0.0, 0.05, 0.1])
    for name in FLOAT_NAMES:
        alone = _merge(
            {name: base[name]},
            [{name: one[name]} for one in tuned],
            weight=[weight(name, model) for model in range(3)],
            density=[0.5, 0.25, 0.25],
            gamma=[0.0, 0.05, 0.1],
        )
        assert merged[name].equal(alone[name])
    listed = _merge(base, tuned, weight=torch.tensor([0.5, 0.25, 1.0]))
    assert_same_bits(listed, _merge(base, tuned, weight=(0.5, 0.25, 1.0)))


def test_sign_consensus_and_normalization() -> None:
    base = {"w": torch.zeros(4)}
    tuned = [{"w": torch.tensor([1.0, 1.0, -4.0, 2.0])}, {"w": torch.tensor([3.0, -2.0, 1.0, -2.0])}]
    settings: dict[str, Any] = {"weight": [0.5, 1.0], "density": 1.0, "gamma": 0.0}
    assert merge_breadcrumbs(base, tuned, **settings)["w"].tolist() == [3.5, -1.5, -1.0, -1.0]
    assert merge_breadcrumbs(base, tuned, normalize=True, **settings)["w"].tolist() == pytest.approx([v / 1.5 for v in (3.5, -1.5, -1, -1)])
    settings["sign_consensus"] = True
    assert merge_breadcrumbs(base, tuned, **settings)["w"].tolist() == [3.5, -2.0, -2.0, -2.0]
    assert merge_breadcrumbs(base, tuned, lambda_=0.5, **settings)["w"].tolist() == [1.75, -1.0, -1.0, -1.0]
    assert merge_breadcrumbs(base, tuned, normalize=True, **settings)["w"].tolist() == pytest.approx([3.5 / 1.5, -2.0, -4.0, -2.0])
    settings["weight"] = [1.0, 1.0]
    assert merge_breadcrumbs(base, tuned, **settings)["w"].tolist() == [4.0, -2.0, -4.0, 2.0]


def test_weights_that_cancel_are_not_divided() -> None:
    base, tuned = {"w": torch.zeros(3)}, [{"w": torch.full((3,), float(value))} for value in (1, 2, 4)]
    merged = merge_breadcrumbs(base, tuned, weight=[0.1, 0.2, -0.3], density=1.0, gamma=0.0, normalize=True)
    assert merged["w"].tolist() == pytest.approx([-0.7] * 3)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight


def test_modules_and_tied_weights() -> None:
    torch.manual_seed(0)
    base, *tuned = (_Net() for _ in range(3))
    named: list[tuple[str, int]] = []

    def weight(name: str, model: int) -> float:
        named.append((name, model))
        return 0.4

    merged = _merge(base.state_dict(), [one.state_dict() for one in tuned], weight=weight)
    assert merged["embed.weight"] is merged["head.weight"]
    assert ("embed.weight", 1) in named
    assert not any(name == "head.weight" for name, _ in named)
    assert not any(tensor.requires_grad for tensor in merged.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merge_breadcrumbs: nothing")
        assert_same_bits(merge_breadcrumbs(base, tuned, weight=0.4), merged)
        assert_same_bits(merge_breadcrumbs(base, [tuned[0], tuned[1].state_dict()], weight=0.4), merged)
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    base.load_state_dict(merged)
    untied = tuned[1].state_dict()
    untied["head.weight"] = untied["head.weight"] + 1
    apart = _merge(base.state_dict(), [tuned[0].state_dict(), untied], weight=0.4)
    assert not apart["embed.weight"].equal(apart["head.weight"])


@too_short
def test_dtypes_may_differ_and_the_bases_stays() -> None:
    base, tuned = models(3, torch.bfloat16)
    mixed = [tuned[0], {name: value.float() if name != STEPS else value for name, value in tuned[1].items()}, tuned[2]]
    assert_same_bits(merge_breadcrumbs(base, mixed), merge_breadcrumbs(base, tuned))


# Bad input does not fit the types either.
untyped: Callable[..., Any] = merge_breadcrumbs
X = {"w": torch.arange(1.0, 9.0)}
Y = {"w": torch.arange(1.0, 9.0).flip(0)}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"density: expected a kept share in \(0, 1\], got 0", lambda: untyped(X, [Y], density=0)),
        (ValueError, r"density: expected a kept share in \(0, 1\], got 1.5", lambda: untyped(X, [Y], density=1.5)),
        (ValueError, r"density\[1\]: .*got -0.1", lambda: untyped(X, [Y, Y], density=[0.5, -0.1])),
        (ValueError, r"density\('w', 0\): .*got 2", lambda: untyped(X, [Y], density=lambda name, model: 2.0)),
        (ValueError, "density: expected a finite number, got nan", lambda: untyped(X, [Y], density=math.nan)),
        (ValueError, r"gamma: expected a removed share in \[0, 1\), got 1", lambda: untyped(X, [Y], gamma=1)),
        (ValueError, r"gamma: expected a removed share in \[0, 1\), got -0.5", lambda: untyped(X, [Y], gamma=-0.5)),
        (ValueError, "finetuned: expected at least one model, got none", lambda: untyped(X, [])),
        (ValueError, r"weight: .*one per model \(2\), got 3", lambda: untyped(X, [Y, Y], weight=[1, 2, 3])),
        (ValueError, r"density: .*one per model \(2\), got 1", lambda: untyped(X, [Y, Y], density=[0.5])),
        (ValueError, r"gamma: .*one per model \(1\), got 0", lambda: untyped(X, [Y], gamma=[])),
        (ValueError, "weight: expected a finite number, got inf", lambda: untyped(X, [Y], weight=math.inf)),
        (ValueError, "weight: of tensor 'w' up to model 1 sum to 4e", lambda: untyped(X, [Y, Y], weight=2e38)),
        (ValueError, "lambda_: expected at most 3.4", lambda: untyped(X, [Y], lambda_=1e39)),
        (TypeError, "weight: expected a number, got str", lambda: untyped(X, [Y], weight="1")),
        (TypeError, "weight: expected a number, got bool", lambda: untyped(X, [Y], weight=True)),
        (TypeError, r"weight\[0\]: expected a number, got NoneType", lambda: untyped(X, [Y], weight=[None])),
        (ValueError, "granularity: expected one of tensor, row, got 'layer'", lambda: untyped(X, [Y], granularity="layer")),
        (ValueError, "on_overflow: expected one of drop, density", lambda: untyped(X, [Y], on_overflow="keep")),
        (TypeError, "finetuned: expected a list of models, got dict", lambda: untyped(X, Y)),
        (TypeError, r"base: expected a state dict or a torch.nn.Module, got list", lambda: untyped([X], [Y])),
        (TypeError, r"finetuned\[0\]: expected a state dict", lambda: untyped(X, [torch.ones(3)])),
        (TypeError, r"finetuned\[0\]: expected tensors by name, got 'w' with int", lambda: untyped(X, [{"w": 3}])),
        (
            ValueError,
            r"finetuned\[1\]: tensor 'w': expected shape \(8,\) as in base, got \(2, 4\)",
            lambda: untyped(X, [Y, {"w": torch.ones(2, 4)}]),
        ),
        (TypeError, r"finetuned\[0\]: tensor 'w': expected float32.*got torch.int64", lambda: untyped(X, [{"w": torch.arange(8)}])),
        (TypeError, r"base: tensor 'w': expected float32.*got torch.float8", lambda: untyped({"w": X["w"].to(torch.float8_e5m2)}, [Y])),
    ],
)
def test_bad_input_is_refused_by_name(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^merge_breadcrumbs: {match}"):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_that_is_not_finite_is_refused(value: float, place: int, dtype: torch.dtype) -> None:
    base, tuned = {"v": torch.ones(5, dtype=dtype), "w": torch.zeros(1000, dtype=dtype)}, []
    for number in range(3):
        tuned.append({"v": torch.ones(5, dtype=dtype), "w": _delta(1000, dtype=dtype, seed=number)})
    tuned[1]["w"][place] = value
    with pytest.raises(ValueError, match=r"finetuned\[1\]: tensor 'w': its difference from base holds NaN or infinity"):
        _merge(base, tuned)
    before = tuned[1]["w"].clone()
    for function in (breadcrumbs_, breadcrumbs_mask):
        with pytest.raises(ValueError, match=f"{function.__name__}: delta: expected finite values"):
            function(tuned[1]["w"])
    assert tuned[1]["w"].view(torch.uint8).equal(before.view(torch.uint8))


def test_a_difference_that_overflows_is_refused() -> None:
    large = torch.full((8,), 3e38)
    with pytest.raises(ValueError, match=r"finetuned\[0\]: tensor 'w': its difference"):
        merge_breadcrumbs({"w": large}, [{"w": -large}])


def test_a_result_that_does_not_fit_its_dtype_is_refused() -> None:
    base, tuned = {"w": torch.full((8,), 6e4).half()}, [{"w": torch.full((8,), 6.5e4).half()}]
    settings: dict[str, Any] = {"density": 1.0, "gamma": 0.0}
    with pytest.raises(ValueError, match=r"tensor 'w': a merged value is too large for torch.float16"):
        merge_breadcrumbs(base, tuned, weight=3.0, **settings)
    assert merge_breadcrumbs(base, tuned, weight=1.0, **settings)["w"].equal(tuned[0]["w"])


@pytest.mark.parametrize("function", [breadcrumbs_, breadcrumbs_mask])
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "delta: expected float32, .* got torch.int64", {"delta": torch.arange(8)}),
        (TypeError, "delta: expected a tensor, got list", {"delta": [1.0]}),
        (ValueError, r"density: expected a kept share in \(0, 1\], got 0", {"density": 0}),
        (TypeError, "gamma: expected a number, got str", {"gamma": "0.1"}),
        (ValueError, r"gamma: .*got 1.0", {"gamma": 1.0}),
        (ValueError, "granularity: expected one of", {"granularity": "column"}),
        (ValueError, "on_overflow: expected one of", {"on_overflow": "keep"}),
    ],
)
def test_the_mask_functions_refuse(function: Callable[..., Tensor], error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: {match}"):
        function(**({"delta": torch.ones(8)} | arguments))


def test_in_place_refuses_what_it_cannot_write() -> None:
    with pytest.raises(ValueError, match="breadcrumbs_: delta: expected a tensor that can be written to"):
        breadcrumbs_(torch.ones(1).expand(8))
    with pytest.raises(RuntimeError, match="breadcrumbs_: delta requires grad"):
        breadcrumbs_(torch.ones(8, requires_grad=True))
    with torch.no_grad():
        breadcrumbs_(torch.ones(8, requires_grad=True))


def test_empty_and_dimensionless() -> None:
    assert breadcrumbs_mask(torch.empty(0, 3)).shape == (0, 3)
    assert breadcrumbs_(torch.empty(3, 0), granularity="row").shape == (3, 0)
    assert breadcrumbs_mask(torch.tensor(2.0), granularity="row").item() is True
    with pytest.warns(UserWarning, match="nothing is kept"):
        assert breadcrumbs_(torch.tensor(2.0)).item() == 0
