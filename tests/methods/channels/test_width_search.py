"""From a preference and a budget to widths: the rule for decoders, the search over the encoder, and the volume that points dominate."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slim_networks import TARGETS, X, normal, slim_network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taskloom.methods.channels.controllable_mtl import (
    Evolution,
    FlopTable,
    InfeasibleBudget,
    SlimConv2d,
    SlimLinear,
    SlimMultiTask,
    WidthConfig,
    WidthSearch,
    calibrate,
    count_flops,
    decoder_levels,
    export,
    hypervolume,
    search_widths,
)

GRID = (0.25, 0.5, 0.75, 1.0)
LOADER = [(X, TARGETS), (normal(2, 3, 8, 8, seed=1), {task: target[:2] for task, target in TARGETS.items()})]
QUICK = Evolution(population=8, generations=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _brightness(output: Tensor, target: Tensor) -> float:
    """Depends on the weights at every width, which is all that the tests need."""
    return float(output.gather(1, target[:, None]).sigmoid().double().mean())


@cache
def _search(*tasks: str) -> WidthSearch:
    return WidthSearch(slim_network(tasks=tasks or ("a", "b")), LOADER, _brightness)


def _costs() -> tuple[int, int]:
    search = _search()
    return search.flops(WidthConfig(0.25, {"a": 0.25, "b": 0.25})), search.full_flops


preferences = st.floats(0, 1).map(lambda share: (share, 1 - share))


@settings(max_examples=30, deadline=None)
@given(preferences, st.floats(0, 1), st.floats(0, 1))
def test_budgets_are_kept_and_larger_ones_do_no_worse(preference: tuple[float, float], low: float, high: float) -> None:
    least, most = _costs()
    found = []
    for share in sorted((low, high)):
        budget = least + int(share * (most - least))
        config, info = _search().find(preference, budget)
        assert info.flops == _search().flops(config) <= budget
        assert info.score == pytest.approx(_search().score(dict(zip("ab", preference, strict=True)), config))
        found.append(info.score)
    assert found[0] <= found[1]


@settings(max_examples=30, deadline=None)
@given(preferences, st.floats(0, 1))
def test_swapped_tasks_swap_the_result(preference: tuple[float, float], share: float) -> None:
    least, most = _costs()
    budget = least + int(share * (most - least))
    config, info = _search("a", "b").find(preference, budget)
    other, other_info = _search("b", "a").find(preference[::-1], budget)
    assert other == config
    assert other_info.score == info.score
    assert other_info.metrics == info.metrics


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(any), st.lists(st.floats(0.05, 1), min_size=1, max_size=6))
def test_preferred_tasks_get_wider_decoders(values: list[float], widths: list[float]) -> None:
    grid = tuple(sorted(set(widths)))
    preference = {str(place): value for place, value in enumerate(values)}
    levels = decoder_levels(preference, grid)
    assert max(levels[0].values()) == grid[-1]
    assert set(levels[-1].values()) == {grid[0]}
    for level in levels:
        for one, other in itertools.product(preference, repeat=2):
            if preference[one] >= preference[other]:
                assert level[one] >= level[other]
    for upper, lower in itertools.pairwise(levels):
        assert all(grid.index(lower[task]) == max(grid.index(upper[task]) - 1, 0) for task in preference)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=4).filter(lambda values: sum(values) > 0.1), st.floats(0, 1))
def test_a_task_that_gains_weight_gets_no_narrower_decoder(values: list[float], share: float) -> None:
    """The first level, where weight moves to one task from all others alike."""
    before = [value / sum(values) for value in values]
    after = [before[0] + share * (1 - before[0]), *((1 - share) * value for value in before[1:])]
    first, second = (decoder_levels({str(place): value for place, value in enumerate(one)}, GRID)[0] for one in (before, after))
    assert second["0"] >= first["0"]


def test_decoder_widths_of_the_rule() -> None:
    assert decoder_levels({"a": 0.6, "b": 0.3, "c": 0.1}, GRID)[:2] == [
        {"a": 1.0, "b": 0.75, "c": 0.5},
        {"a": 0.75, "b": 0.5, "c": 0.25},
    ]
    assert decoder_levels({"a": 1.0, "b": 0.0}, GRID)[0] == {"a": 1.0, "b": 0.25}
    assert decoder_levels({"a": 0.5, "b": 0.5}, (0.5,)) == [{"a": 0.5, "b": 0.5}]


def test_best_of_what_this_and_smaller_budgets_get() -> None:
    """As the rule says it, budget by budget: the first level that fits, and the best encoder beside it."""
    search, preference = _search(), {"a": 0.7, "b": 0.3}
    levels = decoder_levels(preference, GRID)
    full = search.measure(search.full)

    def score(config: WidthConfig) -> float:
        return sum(preference[task] * value / full[task] for task, value in search.measure(config).items())

    def by_the_rule(budget: int) -> list[WidthConfig]:
        for decoders in levels:
            fitting = [one for one in (WidthConfig(width, decoders) for width in GRID) if search.flops(one) <= budget]
            if fitting:
                return fitting
        raise AssertionError("nothing fits")

    costs = sorted({search.flops(WidthConfig(width, decoders)) for width in GRID for decoders in levels})
    best = 0.0
    compared: set[WidthConfig] = set()
    for budget in costs:
        own = by_the_rule(budget)
        compared |= set(own)
        best = max(best, *(score(one) for one in own))
        config, info = search.find(preference, budget)
        assert config in compared
        assert score(config) == pytest.approx(best)
        assert info.candidates == len(compared)
        assert config.decoders == levels[info.level]
        assert search.find((0.7, 0.3), budget)[0] is config
    assert search.find(preference, 1.0)[0] == config


def test_ties_go_to_the_wider_decoders_then_to_less_work() -> None:
    config, info = search_widths(slim_network(), (0.9, 0.1), 1.0, LOADER, lambda output, target: 1.0)
    assert config == WidthConfig(0.25, {"a": 1.0, "b": 0.25})
    assert (info.level, info.score) == (0, 1.0)


def test_tight_budgets_lower_all_decoders() -> None:
    search = _search()
    least = _costs()[0]
    config, info = search.find((0.5, 0.5), least)
    assert config == WidthConfig(0.25, {"a": 0.25, "b": 0.25})
    assert (info.level, info.flops, info.candidates) == (3, least, 1)
    with pytest.raises(InfeasibleBudget, match=f"expected at least {least} operations, .* got {least - 1}") as caught:
        search.find((0.5, 0.5), least - 1)
    assert caught.value.minimum == least
    assert pickle.loads(pickle.dumps(caught.value)).minimum == least
    assert isinstance(caught.value, ValueError)


def test_metrics_are_means_over_samples_and_errors_count_inversely() -> None:
    model = slim_network()
    narrow = WidthConfig(0.5, {"a": 0.5, "b": 0.5})
    with torch.no_grad():
        outputs = torch.cat([model(x, narrow)["a"] for x, _ in LOADER])
    search = WidthSearch(model, LOADER, {"a": _brightness, "b": lambda output, target: 1 + output.square().mean()}, lower_is_better=["b"])
    found, full = search.measure(narrow), search.measure(search.full)
    labels = torch.cat([targets["a"] for _, targets in LOADER])
    assert found["a"] == pytest.approx(_brightness(outputs, labels), rel=1e-5)
    expected = 0.25 * found["a"] / full["a"] + 0.75 * full["b"] / found["b"]
    assert search.score({"a": 0.25, "b": 0.75}, narrow) == pytest.approx(expected)
    assert search.score({"a": 1.0, "b": 0.0}, narrow) == found["a"] / full["a"]


def test_search_changes_nothing_and_remembers() -> None:
    model = slim_network("batch").train()
    calibrate(model, WidthConfig(0.5, {"a": 1.0, "b": 1.0}), [X])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = 0

    def counted(output: Tensor, target: Tensor) -> float:
        nonlocal calls
        calls += 1
        return _brightness(output, target)

    search = WidthSearch(model, LOADER, counted)
    config, _ = search.find((0.5, 0.5), 0.5)
    after = calls
    assert search.find({"b": 0.5, "a": 0.5}, 0.5)[0] == config
    assert calls == after
    assert model.training
    assert set(model.state_dict()) == set(before)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_batch_normalisation_is_calibrated_before_it_is_scored() -> None:
    model, config = slim_network("batch").eval(), WidthConfig(0.5, {"a": 0.25, "b": 1.0})
    inputs = [normal(8, 3, 8, 8, seed=seed) for seed in range(7)]
    search = WidthSearch(model, LOADER, _brightness, calibration=inputs)
    found = search.measure(config)
    calibrate(model, config, inputs, num_batches=5)
    with torch.no_grad():
        values = [_brightness(model(x, config)["a"], targets["a"]) for x, targets in LOADER]
    assert found["a"] == pytest.approx((4 * values[0] + 2 * values[1]) / 6)


def test_evolution_does_no_worse_and_repeats() -> None:
    budget = _search().full_flops // 3
    plain = _search().find((0.7, 0.3), budget)[1]
    config, info = _search().find((0.7, 0.3), budget, evolution=QUICK)
    assert info.score >= plain.score
    assert info.flops == count_flops(slim_network(), config, (1, 3, 8, 8)) <= budget
    assert info.candidates > plain.candidates
    fresh = WidthSearch(slim_network(), LOADER, _brightness).find((0.7, 0.3), budget, evolution=QUICK)
    assert fresh == (config, info)
    assert _search("b", "a").find((0.3, 0.7), budget, evolution=QUICK)[0] == config


def test_evolution_finds_widths_per_part() -> None:
    """The first layer does best when it is narrow, the second when it is wide."""
    encoder = nn.Sequential(SlimConv2d(8, 8, 1, divisor=1), SlimConv2d(8, 8, 1, divisor=1), nn.Flatten())
    model = SlimMultiTask(encoder, {"a": SlimLinear(8 * 4, 1, slim_output=False)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model.encoder[0].weight.zero_()
        model.encoder[0].bias[2:] = -1.0
    loader = [(normal(3, 8, 2, 2), {"a": torch.zeros(3)})]

    def grows(output: Tensor, target: Tensor) -> Tensor:
        return (output / 100).exp().mean()

    assert search_widths(model, [1.0], 1.0, loader, grows)[0].encoder == 0.25
    assert search_widths(model, [1.0], 1.0, loader, grows, evolution=Evolution(12, 8))[0].encoder == (0.25, 1.0)


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ((0.5, 0.6), r"expected a sum of 1, got 1\.1"),
        ((-0.5, 1.5), "expected finite values of at least 0"),
        ((math.nan, 1.0), "expected finite values of at least 0"),
        ((1.0,), "expected 2 values, one per task, got 1"),
        ((0.2, 0.3, 0.5), "expected 2 values, one per task, got 3"),
    ],
)
def test_bad_preferences(preference: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _search().find(preference, 0.5)


@pytest.mark.parametrize("preference", ["ab", 0.5])
def test_what_is_no_preference(preference: Any) -> None:
    with pytest.raises(TypeError, match="search_widths: preference: expected a value per task, got"):
        _search().find(preference, 0.5)


def test_numbers_of_numpy_are_taken() -> None:
    least, most = _costs()
    expected = _search().find((0.7, 0.3), (least + most) // 2)
    assert _search().find(np.array([0.7, 0.3]), np.int64((least + most) // 2)) == expected
    assert _search().find((0.7, 0.3), np.float32(0.5)) == _search().find((0.7, 0.3), 0.5)


def test_preferences_of_other_tasks() -> None:
    with pytest.raises(KeyError, match="no task 'c'"):
        _search().find({"a": 0.5, "c": 0.5}, 0.5)
    with pytest.raises(KeyError, match="'b' is missing"):
        _search().find({"a": 1.0}, 0.5)
    assert _search().find((0.5, 0.5 + 9e-7), 0.5)


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (0, ValueError, "expected at least 1 operation, got 0"),
        (-3, ValueError, "expected at least 1 operation, got -3"),
        (0.0, ValueError, r"expected a share in \(0, 1\]"),
        (2e6, ValueError, "or operations as an int"),
        (math.nan, ValueError, r"expected a share in \(0, 1\]"),
        ("1", TypeError, "got '1'"),
        (True, TypeError, "got True"),
    ],
)
def test_bad_budgets(budget: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _search().find((0.5, 0.5), budget)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loader": []}, ValueError, "loader: expected at least one batch"),
        ({"loader": iter(LOADER)}, TypeError, "what can be read many times"),
        ({"loader": [X]}, TypeError, "loader: expected batches of a tensor and a mapping from tasks to targets, got Tensor"),
        ({"loader": [(X, TARGETS["a"])]}, TypeError, "loader: expected batches of a tensor and a mapping"),
        ({"loader": [(X, {"a": TARGETS["a"]})]}, KeyError, "loader: expected targets of every task, 'b' is missing"),
        ({"grid": ()}, ValueError, "grid: expected at least one ratio"),
        ({"grid": (0.5, 1.5)}, ValueError, r"grid: expected a ratio in \(0, 1\]"),
        ({"metric": {"a": _brightness}}, KeyError, "metric: expected every task, 'b' is missing"),
        ({"lower_is_better": ["c"]}, KeyError, "lower_is_better: there is no task 'c'"),
        ({"metric": lambda output, target: 0.0}, ValueError, "positive value of the whole network for task 'a', got 0.0"),
        ({"metric": lambda output, target: math.nan}, ValueError, "positive value of the whole network for task 'a', got nan"),
    ],
)
def test_what_cannot_be_searched(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WidthSearch(slim_network(), **{"loader": LOADER, "metric": _brightness, **arguments})


@pytest.mark.parametrize("options", [{"population": 1}, {"generations": -1}, {"mutation": 0.0}, {"mutation": 1.5}])
def test_bad_evolution(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Evolution: "):
        Evolution(**options)
    with pytest.raises(TypeError, match=r"Evolution: population: expected an integer, got 4\.5"):
        Evolution(population=4.5)


def test_networks_are_counted_once_per_width() -> None:
    table = FlopTable(slim_network(), (1, 3, 8, 8))
    configs = [WidthConfig(width, {"a": a, "b": b}) for width in GRID for a in GRID for b in GRID]
    assert [table.total(one) for one in configs[::7]] == [count_flops(slim_network(), one, (1, 3, 8, 8)) for one in configs[::7]]
    assert table.encoder(0.5) is table.encoder(0.5)
    assert table.encoder((16, 32))[0] == table.encoder(1.0)[0]


def test_operations_of_tokens_are_what_torch_counts() -> None:
    encoder = nn.Sequential(SlimLinear(16, 32), nn.ReLU(), SlimLinear(32, 64))
    model = SlimMultiTask(encoder, {"a": SlimLinear(64, 4, slim_output=False)})
    config, x = WidthConfig((8, 0.5), {"a": 1.0}), normal(2, 7, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        export(model, config, x)(x)
    assert count_flops(model, config, x.shape) == counter.get_total_flops() == 2 * 2 * 7 * (16 * 8 + 8 * 32 + 32 * 4)


points = st.integers(1, 4).flatmap(
    lambda tasks: st.lists(st.lists(st.integers(-2, 6), min_size=tasks, max_size=tasks), min_size=1, max_size=5)
)


@given(points)
def test_hypervolume_is_that_of_the_union(rows: list[list[int]]) -> None:
    """By inclusion and exclusion, in whole numbers."""
    boxes = [row for row in rows if min(row) > 0]
    expected = 0
    for size in range(1, len(boxes) + 1):
        for chosen in itertools.combinations(boxes, size):
            expected -= (-1) ** size * math.prod(min(column) for column in zip(*chosen, strict=True))
    reference = [3.0] * len(rows[0])
    moved = [[value + 3.0 for value in row] for row in rows]
    assert hypervolume(moved, reference) == expected
    assert hypervolume(moved[::-1], reference) == expected


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_hypervolume_by_drawing_points(tasks: int) -> None:
    generator = np.random.default_rng(tasks)
    found, low = generator.uniform(size=(12, tasks)), 0.1
    drawn = generator.uniform(low, 1, size=(40_000, tasks))
    inside = (drawn[:, None] <= found).all(2).any(1).mean()
    deviation = math.sqrt(inside * (1 - inside) / len(drawn))
    assert abs(hypervolume(found.tolist(), [low] * tasks) / (1 - low) ** tasks - inside) < 4 * deviation


def test_hypervolume_of_two_tasks() -> None:
    assert hypervolume([(0.75, 0.5), (0.5, 0.75), (0.5, 0.5)], (0.25, 0.25)) == 0.1875
    assert hypervolume([(0.75, 0.25)], (0.25, 0.25)) == 0
    assert hypervolume([], (0.0, 0.0)) == 0


@pytest.mark.parametrize(
    ("rows", "reference", "message"),
    [
        ([(1.0, 2.0), (1.0,)], (0.0, 0.0), "expected 2 values each"),
        ([(math.nan, 1.0)], (0.0, 0.0), "finite"),
        ([], (), "expected 0 values"),
    ],
)
def test_points_that_have_no_volume(rows: Any, reference: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hypervolume(rows, reference)
