"""sparse_merge: every combination of stages against the reference, its identities, its errors, and the checkpoint merge's results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_close, assert_same_bits
from safetensors.torch import load_file, save_file
from samples import checkpoints, normal, with_specials
from torch import Tensor

import taskloom
from taskloom._selection import name_key
from taskloom.merge import merge_checkpoints
from taskloom.reference.masked.philox import philox_blocks

SELECTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "top": {"select": "magnitude", "density": [0.2, 0.5, 1.0]},
    "band": {"select": "magnitude", "density": 0.4, "gamma": [0.0, 0.1, 0.7], "on_overflow": "drop"},
    "row band": {"select": "magnitude", "density": 0.4, "gamma": 0.1, "scope": "row"},
    "mask": {"select": "mask"},
    "dropout": {"select": "dropout", "density": [0.0, 0.3, 1.0], "seed": 11, "key": 5},
    "rank dropout": {"select": "rank_dropout", "density": [0.3, 0.5, 1.0], "epsilon": [0.2, 0.0, 0.1], "seed": 3, "key": "a.b"},
}


def combinations(selection: dict[str, Any]) -> Iterator[dict[str, Any]]:
    drops = selection.get("select", "all").endswith("dropout")
    rescales = ("none", "density", "l1") if drops else ("none", "l1")
    elections = (("none", "positive"), ("sign_sum", "negative"), ("sign_count", "majority"))
    votes = (("none", 0), ("selected", 2), ("tall", 2))
    for rescale, (elect, zero_sign), combine, (vote, consensus_k) in itertools.product(
        rescales, elections, ("sum", "weighted_mean", "disjoint_mean"), votes
    ):
        stages = {"rescale": rescale, "elect": elect, "zero_sign": zero_sign, "combine": combine, "vote": vote, "consensus_k": consensus_k}
        yield selection | stages


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_combination_of_stages_is_the_reference(name: str, dtype: torch.dtype) -> None:
    base, tuned = checkpoints(13, 7, dtype=dtype)
    selection = dict(SELECTIONS[name])
    if name == "mask":
        selection["masks"] = [normal(13, 7, seed=9) > 0, taskloom.pack_mask(normal(13, 7, seed=8) > 0), torch.ones(13, 7, dtype=torch.bool)]
    for origin, stages in itertools.product((base, None), combinations(selection)):
        arguments = (origin, tuned, [0.5, 1.0, -0.25])
        got = taskloom.sparse_merge(*arguments, scale=0.7, **stages)
        with taskloom.backend("reference"):
            expected = taskloom.sparse_merge(*arguments, scale=0.7, **stages)
        if stages["rescale"] == "l1":
            assert_close(got, expected)
        else:
            # Every other stage rounds the same in both.
            assert torch.equal(got, expected), stages


def test_values_are_those_of_a_float64_evaluation_on_the_same_mask() -> None:
    base, tuned = checkpoints(101, 13)
    kept = taskloom.sparse_merge(None, [torch.ones(101, 13)], select="dropout", density=0.4, seed=4, key=9)
    got = taskloom.sparse_merge(base, tuned[:1], 0.3, select="dropout", density=0.4, seed=4, key=9, rescale="density")
    assert_close(got, (base.double() + 0.3 / 0.4 * kept * (tuned[0].double() - base)).float())


def test_probabilities_rise_with_the_rank_in_the_row() -> None:
    rows = torch.arange(1.0, 201).repeat(2000, 1)
    kept = taskloom.sparse_merge(None, [rows], select="rank_dropout", density=0.5, epsilon=0.3) != 0
    share = kept.float().mean(0)
    expected = torch.linspace(0.2, 0.8, 200)
    assert (share - expected).abs().max() < 5 * (0.25 / 2000) ** 0.5


def test_philox_gives_the_published_words() -> None:
    # Known answers of Random123 for philox4x32-10.
    zero = philox_blocks(0, 0, torch.tensor([0]))[0].tolist()
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = philox_blocks(0x299F31D0A4093822, 0x0370734413198A2E, torch.tensor([0x85A308D3243F6A88 - 2**64]))[0].tolist()
    assert pi == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_random_masks_depend_on_seed_key_task_and_index_alone() -> None:
    ones = torch.ones(1 << 19)

    def kept(values: Tensor, tasks: int = 1, **stages: Any) -> Tensor:
        return taskloom.sparse_merge(None, [values] * tasks, select="dropout", density=0.5, **stages)

    whole = kept(ones, seed=1, key=2)
    assert whole[:1001].equal(kept(ones[:1001], seed=1, key=2))
    assert whole.equal(kept(ones.double(), seed=1, key=2, out_dtype=torch.float32))
    assert not whole.equal(kept(ones, seed=2, key=2))
    assert not whole.equal(kept(ones, seed=1, key=3))
    two = kept(ones[:1001], 2, seed=1, key=2)
    assert two.equal(kept(ones[:1001], seed=1, key=2) + kept(ones[:1001], seed=1, key=2 + 0x9E3779B97F4A7C15))
    assert kept(ones[:99], seed=1, key="a.b").equal(kept(ones[:99], seed=1, key=name_key("a.b")))


def test_density_one_is_task_arithmetic() -> None:
    base, tuned = checkpoints(31, 33)
    expected = base + 1.0 * sum((0.3 * (task - base) for task in tuned), torch.zeros_like(base))
    for stages in ({}, {"select": "magnitude", "density": 1.0, "gamma": 0.01}, {"select": "dropout", "density": 1.0, "rescale": "density"}):
        assert taskloom.sparse_merge(base, tuned, 0.3, **stages).equal(expected)


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_selection_is_that_of_magnitude_mask(scope: Any) -> None:
    base, tuned = checkpoints(31, 33, dtype=torch.bfloat16)
    band = {"density": 0.3, "gamma": 0.05, "scope": scope}
    masks = [taskloom.magnitude_mask(task, base, **band) for task in tuned]
    expected = taskloom.sparse_merge(base, tuned, 0.3, select="mask", masks=masks)
    assert taskloom.sparse_merge(base, tuned, 0.3, select="magnitude", **band).equal(expected)


@pytest.mark.parametrize("stages", [SELECTIONS["row band"], SELECTIONS["rank dropout"]])
def test_rows_longer_than_a_chunk(stages: dict[str, Any]) -> None:
    base, tuned = checkpoints(2, (1 << 18) + 9)
    got = taskloom.sparse_merge(base, tuned, 0.3, **stages)
    with taskloom.backend("reference"):
        assert got.equal(taskloom.sparse_merge(base, tuned, 0.3, **stages))


@pytest.mark.parametrize(("tasks", "dtype"), [(2, torch.float32), (5, torch.float32), (2, torch.float64)])
def test_a_probability_that_rounds_to_one_keeps_everything(tasks: int, dtype: torch.dtype) -> None:
    base, tuned = checkpoints(1 << 20, tasks=tasks, dtype=dtype)
    stages = {"select": "dropout", "rescale": "l1", "seed": 3}
    got = taskloom.sparse_merge(base, tuned, 0.5, density=[1 - 1e-11, *[0.5] * (tasks - 1)], **stages)
    assert got.equal(taskloom.sparse_merge(base, tuned, 0.5, density=[1.0, *[0.5] * (tasks - 1)], **stages))


@pytest.mark.parametrize("density", [0.0, 1e-12])
def test_a_probability_of_zero_by_rank_keeps_nothing(density: float) -> None:
    base, tuned = checkpoints(13, 7, tasks=2)
    stages = {"select": "rank_dropout", "density": [density, 0.5], "epsilon": [0.0, 0.2], "rescale": "density"}
    got = taskloom.sparse_merge(base, tuned, 0.5, **stages)
    with taskloom.backend("reference"):
        assert got.equal(taskloom.sparse_merge(base, tuned, 0.5, **stages))
    assert got.isfinite().all()


def test_signaling_nans_rank_by_their_bits() -> None:
    values = torch.tensor([0x7F81, 0x7FC0, 0x3F80, 0x7F82], dtype=torch.int16).view(torch.bfloat16)
    kept = taskloom.sparse_merge(None, [values], select="magnitude", density=0.25)
    assert kept.isnan().equal(taskloom.magnitude_mask(values, rank=1))


def test_meta_tensors_give_shapes() -> None:
    base, tuned = checkpoints(3, 5)
    merged = taskloom.sparse_merge(base.to("meta"), [task.to("meta") for task in tuned], select="magnitude", density=0.5, gamma=0.1)
    assert merged.is_meta
    assert merged.shape == (3, 5)


def test_a_merge_of_many_is_the_sum_of_single_merges() -> None:
    base, tuned = checkpoints(301, tasks=5)
    stages = {"select": "magnitude", "density": 0.2, "gamma": 0.01}
    single = sum((taskloom.sparse_merge(base, [task], 0.3, **stages).double() - base for task in tuned), torch.zeros(301))
    torch.testing.assert_close(taskloom.sparse_merge(base, tuned, 0.3, **stages).double() - base, single, rtol=0, atol=1e-6)


def test_consensus_counts() -> None:
    base, tuned = checkpoints(301)
    plain = taskloom.sparse_merge(base, tuned)
    for vote in ("selected", "tall"):
        assert taskloom.sparse_merge(base, tuned, vote=vote, consensus_k=0).equal(plain)
        assert taskloom.sparse_merge(base, tuned, vote=vote, consensus_k=4).equal(base)
        assert taskloom.sparse_merge(base, tuned, vote=vote, consensus_k=2**40).equal(base)


@pytest.mark.parametrize(("zero_sign", "expected"), [("positive", 2.0), ("negative", -2.0), ("majority", -2.0)])
def test_an_election_of_zero_takes_the_sign_asked_for(zero_sign: Any, expected: float) -> None:
    tuned = [torch.tensor([2.0, -1.0, -1.0]), torch.tensor([-2.0, 0.0, -1.0])]
    got = taskloom.sparse_merge(None, tuned, [1.0, 1.0], elect="sign_sum", zero_sign=zero_sign)
    assert got.tolist() == [expected, -1.0, -2.0]


def test_at_least_one_keeps_one_of_a_small_tensor() -> None:
    values = torch.tensor([1.0, -3.0, 2.0])
    assert taskloom.sparse_merge(None, [values], select="magnitude", density=0.1).count_nonzero() == 0
    kept = taskloom.sparse_merge(None, [values], select="magnitude", density=0.1, at_least_one=True)
    assert kept.tolist() == [0.0, -3.0, 0.0]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_ranks_in_place_of_a_density(scope: Any) -> None:
    base, tuned = checkpoints(37, 29)
    length = 29 if scope == "row" else 37 * 29
    bands = [(0, length // 3), (length // 9, length // 2), (length, length)]
    got = taskloom.sparse_merge(base, tuned, 0.5, select="magnitude", scope=scope, rank=[bands[0][1], *bands[1:]])
    masks = [taskloom.magnitude_mask(task, base, rank=band, scope=scope) for task, band in zip(tuned, bands, strict=True)]
    assert_same_bits(got, taskloom.sparse_merge(base, tuned, 0.5, select="mask", masks=masks))


def test_negative_zero_becomes_zero_and_an_election_drops_nan() -> None:
    base = torch.tensor([-0.0, 0.0, 1.0])
    tuned = [torch.tensor([-0.0, torch.nan, 1.0]), torch.tensor([-0.0, 2.0, 1.0])]
    elected = taskloom.sparse_merge(base, tuned, elect="sign_sum")
    assert elected.tolist() == [0.0, 2.0, 1.0]
    assert not elected.signbit().any()
    assert taskloom.sparse_merge(base, tuned)[1].isnan()


@pytest.mark.parametrize(
    "stages",
    [
        {"select": "magnitude", "density": 0.3, "elect": "sign_sum", "combine": "disjoint_mean"},
        {"select": "rank_dropout", "density": 0.5, "epsilon": 0.2, "rescale": "l1"},
        {"select": "magnitude", "density": 0.3, "scope": "row", "elect": "sign_sum", "zero_sign": "majority"},
    ],
)
def test_out_may_be_an_input(stages: dict[str, Any]) -> None:
    base, tuned = checkpoints(600, 700)
    expected = taskloom.sparse_merge(base, tuned, 0.5, **stages)
    onto_base = base.clone()
    assert taskloom.sparse_merge(onto_base, tuned, 0.5, **stages, out=onto_base) is onto_base
    assert onto_base.equal(expected)
    onto_task = tuned[1].clone()
    taskloom.sparse_merge(base, [tuned[0], onto_task, tuned[2]], 0.5, **stages, out=onto_task)
    assert onto_task.equal(expected)
    transposed = base.t().contiguous().t()
    taskloom.sparse_merge(transposed, tuned, 0.5, **stages, out=transposed)
    assert transposed.equal(expected)


def test_out_may_overlap_an_input() -> None:
    storage = normal(5000)
    base, out = storage[:4000], storage[100:4100]
    _, tuned = checkpoints(4000)
    expected = taskloom.sparse_merge(base, tuned, 0.5)
    taskloom.sparse_merge(base, tuned, 0.5, out=out)
    assert out.equal(expected)
    shared = torch.zeros(4001).view(torch.bfloat16)[1:4001]
    shared.copy_(normal(4000))
    expected = taskloom.sparse_merge(shared, tuned, 0.5, out_dtype=torch.float32)
    same_memory = torch.empty(0).set_(shared.untyped_storage(), 0, (4000,), (1,))
    assert taskloom.sparse_merge(shared, tuned, 0.5, out=same_memory).equal(expected)


def _merged_by_recipe(folder: Path, models: list[dict[str, Tensor]], method: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    for number, tensors in enumerate(models):
        (folder / f"m{number}").mkdir()
        save_file(tensors, folder / f"m{number}" / "model.safetensors")
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "m0"),
        "models": [{"model": str(folder / f"m{t}"), "parameters": {"weight": 0.6}} for t in range(1, len(models))],
        "parameters": settings,
    }
    merge_checkpoints(recipe, folder / "out", seed=12)
    return load_file(folder / "out" / "model.safetensors")


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": (
        {"density": 0.3},
        {"select": "magnitude", "density": 0.3, "at_least_one": True, "elect": "sign_sum", "combine": "disjoint_mean"},
    ),
    "dare_linear": (
        {"density": 0.4, "rescale": "density", "lambda": 0.8},
        {"select": "dropout", "density": 0.4, "rescale": "density", "scale": 0.8},
    ),
    "dare_ties": (
        {"density": 0.4, "rescale": "l1", "elect": "count", "normalize": False},
        {"select": "dropout", "density": 0.4, "rescale": "l1", "elect": "sign_count"},
    ),
    "della": (
        {"density": 0.5, "epsilon": 0.1, "normalize": True},
        {
            "select": "rank_dropout",
            "density": 0.5,
            "epsilon": 0.1,
            "rescale": "l1",
            "elect": "sign_sum",
            "combine": "disjoint_mean",
        },
    ),
    "breadcrumbs": (
        {"density": 0.4, "gamma": 0.05, "scope": "row"},
        {"select": "magnitude", "density": 0.4, "gamma": 0.05, "scope": "row"},
    ),
    "consensus_ta": ({"tall_mask_lambda": 0.5, "consensus_k": 2}, {"vote": "tall", "tall_mask_lambda": 0.5, "consensus_k": 2}),
}


@pytest.mark.parametrize("method", RECIPES)
def test_a_checkpoint_merge_gives_the_same_bits(tmp_path: Path, method: str) -> None:
    shapes = {"layers.0.weight": (301, 33), "norm.weight": (17,)}
    models = [{} for _ in range(4)]
    for number, (name, shape) in enumerate(shapes.items()):
        base, tuned = checkpoints(*shape, dtype=torch.bfloat16, seed=10 * number)
        for model, tensor in zip(models, (base, *tuned), strict=True):
            model[name] = tensor
    settings, stages = RECIPES[method]
    merged = _merged_by_recipe(tmp_path, models, method, settings)
    for name in shapes:
        ours = taskloom.sparse_merge(models[0][name], [model[name] for model in models[1:]], 0.6, **stages, seed=12, key=name)
        assert_same_bits(ours, merged[name])


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float64])
def test_a_whole_models_thresholds_give_the_same_bits(tmp_path: Path, second: torch.dtype) -> None:
    models = [{} for _ in range(3)]
    for number, (name, shape) in enumerate({"a": (64, 65), "b": (19,), "c": (7, 3)}.items()):
        base, tuned = checkpoints(*shape, tasks=2, seed=10 * number)
        for model, tensor in zip(models, (base, *tuned), strict=True):
            model[name] = (tensor * 16).round() / 16
        models[2][name] = models[2][name].to(second)
    merged = _merged_by_recipe(tmp_path, models, "ties", {"density": 0.3, "scope": "model"})
    names = list(merged)
    base = [models[0][name] for name in names]
    wide = [tensor.double() for tensor in base] if second == torch.float64 else base
    shares = []
    for model in models[1:]:
        tuned = [model[name] for name in names]
        shares.append(taskloom.split_threshold(taskloom.magnitude_threshold(tuned, wide, density=0.3), tuned, wide))
    for place, name in enumerate(names):
        ours = taskloom.sparse_merge(
            models[0][name],
            [model[name] for model in models[1:]],
            0.6,
            select="magnitude",
            threshold=[share[place] for share in shares],
            elect="sign_sum",
            combine="disjoint_mean",
        )
        assert_same_bits(ours, merged[name])


X, Y = normal(3), normal(3, seed=1)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "tuned: expected a list", lambda: taskloom.sparse_merge(X, Y)),
        (ValueError, "tuned: expected at least one", lambda: taskloom.sparse_merge(X, [])),
        (TypeError, r"tuned\[1\]: .*int64", lambda: taskloom.sparse_merge(X, [Y, torch.arange(3)])),
        (ValueError, r"tuned\[0\]: expected shape \(3,\) as base, got \(4,\)", lambda: taskloom.sparse_merge(X, [normal(4)])),
        (ValueError, r"weight: .*\(2\), got 3", lambda: taskloom.sparse_merge(X, [Y, Y], [1, 2, 3])),
        (TypeError, "weight: expected a number, got str", lambda: taskloom.sparse_merge(X, [Y], ["1"])),
        (ValueError, "weight: .*got nan", lambda: taskloom.sparse_merge(X, [Y], float("nan"))),
        (ValueError, "select: expected one of all", lambda: taskloom.sparse_merge(X, [Y], select="top")),
        (ValueError, "density: has no meaning with select='all'", lambda: taskloom.sparse_merge(X, [Y], density=0.5)),
        (ValueError, "gamma: has no meaning", lambda: taskloom.sparse_merge(X, [Y], select="dropout", density=0.5, gamma=0.1)),
        (ValueError, "density: .*needs density, rank or threshold", lambda: taskloom.sparse_merge(X, [Y], select="magnitude")),
        (
            ValueError,
            "threshold: expected no density",
            lambda: taskloom.sparse_merge(X, [Y], select="magnitude", gamma=0.1, threshold=[taskloom.magnitude_threshold(X, rank=1)]),
        ),
        (ValueError, r"rank: .*per task \(1\), got 2", lambda: taskloom.sparse_merge(X, [Y], select="magnitude", rank=[(0, 1), (0, 1)])),
        (ValueError, "rank: .*per task.*got int", lambda: taskloom.sparse_merge(X, [Y], select="magnitude", rank=1)),
        (
            ValueError,
            r"rank: expected begin <= end, got \(2, 1\)",
            lambda: taskloom.sparse_merge(X, [Y], select="magnitude", rank=[(2, 1)]),
        ),
        (ValueError, "rank: expected 0 <= rank <= 3", lambda: taskloom.sparse_merge(X, [Y], select="magnitude", rank=[4])),
        (ValueError, "rank: expected no density", lambda: taskloom.sparse_merge(X, [Y], select="magnitude", density=0.5, rank=[1])),
        (ValueError, "rank: has no meaning", lambda: taskloom.sparse_merge(X, [Y], rank=[1])),
        (ValueError, "threshold: .*per task", lambda: taskloom.sparse_merge(X, [Y], select="magnitude", threshold=[])),
        (ValueError, "epsilon: .*needs", lambda: taskloom.sparse_merge(X, [Y], select="rank_dropout", density=0.5)),
        (ValueError, "epsilon: .*inside", lambda: taskloom.sparse_merge(X, [Y], select="rank_dropout", density=0.5, epsilon=0.5)),
        (ValueError, "masks: .*one mask per task", lambda: taskloom.sparse_merge(X, [Y], select="mask", masks=[])),
        (ValueError, r"masks\[0\]: expected shape", lambda: taskloom.sparse_merge(X, [Y], select="mask", masks=[normal(4) > 0])),
        (TypeError, r"masks\[0\]: expected torch.uint8", lambda: taskloom.sparse_merge(X, [Y], select="mask", masks=[X])),
        (ValueError, "rescale: 'density' divides", lambda: taskloom.sparse_merge(X, [Y], rescale="density")),
        (ValueError, "consensus_k", lambda: taskloom.sparse_merge(X, [Y], consensus_k=2)),
        (TypeError, "consensus_k: expected an int", lambda: taskloom.sparse_merge(X, [Y], vote="selected", consensus_k=1.5)),
        (ValueError, "tall_mask_lambda: .*above 0", lambda: taskloom.sparse_merge(X, [Y], vote="tall", tall_mask_lambda=0)),
        (ValueError, r"seed: expected 0 <= seed < 2\*\*64", lambda: taskloom.sparse_merge(X, [Y], seed=-1)),
        (TypeError, "key: expected an int", lambda: taskloom.sparse_merge(X, [Y], key=0.5)),
        (TypeError, "out_dtype", lambda: taskloom.sparse_merge(X, [Y], out_dtype=torch.int32)),
        (ValueError, "out: expected shape", lambda: taskloom.sparse_merge(X, [Y], out=normal(4))),
        (ValueError, "out: expected a tensor that can be written to", lambda: taskloom.sparse_merge(X, [Y], out=normal(1).expand(3))),
        (ValueError, "out_dtype: expected torch.float32", lambda: taskloom.sparse_merge(X, [Y], out=normal(3), out_dtype=torch.half)),
        (RuntimeError, "out: .*no gradient", lambda: taskloom.sparse_merge(X, [Y], out=normal(3).requires_grad_())),
        (RuntimeError, "out: .*no gradient", lambda: taskloom.sparse_merge(X.clone().requires_grad_(), [Y], out=normal(3))),
    ],
)
def test_errors_name_op_argument_expected_and_got(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^sparse_merge: {match}"):
        call()


def test_the_compiled_side_checks_what_memory_safety_needs() -> None:
    def call(tuned: list[Tensor], out: Tensor, **changed: Any) -> None:
        plain: dict[str, Any] = {"select": "all", "by_row": False, "rank_begin": [], "rank_end": [], "threshold": None}
        plain |= {"equal_kept": None, "masks": [], "density": [], "epsilon": [], "seed": 0, "key": 0, "rescale": "none"}
        plain |= {"elect": "none", "zero_sign": 1, "vote": "none", "consensus_k": 0, "tall_mask_lambda": [], "combine": "sum"}
        torch.ops.taskloom.sparse_merge_out.default(X, tuned, **(plain | {"weight": [1.0], "scale": 1.0} | changed), out=out)

    untouched = torch.zeros(3)
    for tuned, changed in (
        ([normal(4)], {}),
        ([Y], {"weight": []}),
        ([Y], {"select": "mask", "masks": [torch.zeros(0, dtype=torch.uint8)]}),
        ([Y], {"select": "magnitude", "rank_begin": [0], "rank_end": [4]}),
        ([Y], {"select": "dropout"}),
        ([Y], {"select": "unknown"}),
        ([Y], {"vote": "tall"}),
        ([Y], {"elect": "sign_sum", "zero_sign": 7}),
    ):
        with pytest.raises(RuntimeError):
            call(tuned, untouched, **changed)
    with pytest.raises(RuntimeError, match="out"):
        call([Y], torch.zeros(2))
    assert untouched.equal(torch.zeros(3))


def test_it_has_no_gradient_and_says_so() -> None:
    base, tuned = checkpoints(9)
    merged = taskloom.sparse_merge(base.requires_grad_(), tuned)
    with pytest.raises(RuntimeError, match="sparse_merge has no gradient"):
        merged.sum().backward()
    with torch.no_grad():
        taskloom.sparse_merge(base, tuned, out=base)
    with pytest.raises(RuntimeError, match=r"sparse_merge does not work under torch\.func's vmap"):
        torch.func.vmap(lambda row: taskloom.sparse_merge(None, [row]))(normal(3, 4))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_with_dynamic_shapes() -> None:
    def merged(base: Tensor, tuned: list[Tensor]) -> Tensor:
        stages: dict[str, Any] = {"select": "magnitude", "density": 0.3, "elect": "sign_sum"}
        first = taskloom.sparse_merge(base, tuned, 0.5, **stages)
        target = torch.zeros_like(base)
        taskloom.sparse_merge(first, tuned, select="dropout", density=0.5, key="name", seed=3, out=target)
        return target

    compiled = torch.compile(merged, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((9, 33), (12, 31)):
        base, tuned = checkpoints(*shape)
        assert compiled(base, tuned).equal(merged(base, tuned))


def test_specials_leave_other_entries_alone() -> None:
    base, tuned = normal(301), with_specials(301)
    got = taskloom.sparse_merge(base, [tuned], 0.5)
    finite = tuned.isfinite()
    assert got[finite].equal((base + 0.5 * (tuned - base))[finite])
    assert not got[~finite].isfinite().any()


def test_out_marks_the_target_as_changed() -> None:
    base, tuned = checkpoints(33)
    scale = torch.ones(33, requires_grad=True)
    loss = (scale * base).sum()
    taskloom.sparse_merge(base, tuned, out=base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_statistics_are_counts_of_the_merge() -> None:
    base, tuned = checkpoints(37, 29, tasks=3)
    out = torch.empty_like(base)
    merged, counted = taskloom.sparse_merge(
        base, tuned, 0.5, select="magnitude", density=[0.1, 0.2, 1.0], elect="sign_sum", out=out, statistics=True
    )
    assert merged is out
    assert merged.equal(taskloom.sparse_merge(base, tuned, 0.5, select="magnitude", density=[0.1, 0.2, 1.0], elect="sign_sum"))
    assert counted.kept.tolist() == [107, 214, 1073]
    deltas = torch.stack([task - base for task in tuned]).flatten(1)
    torch.testing.assert_close(counted.dots, deltas.double() @ deltas.double().T, rtol=1e-6, atol=1e-4)
    assert not counted.nonfinite
    masks = [taskloom.magnitude_mask(task, base, density=share) for task, share in zip(tuned, (0.1, 0.2, 1.0), strict=True)]
    parts = torch.stack([0.5 * (task - base) * mask for task, mask in zip(tuned, masks, strict=True)])
    assert counted.conflicts == ((parts > 0).any(0) & (parts < 0).any(0)).sum()
    assert counted.sign_sum == parts.sum(0).sign().sum()


def test_statistics_tell_what_is_not_finite_from_what_is_large() -> None:
    base = torch.zeros(600)
    for value, expected in ((torch.nan, True), (torch.inf, True), (3e38, False)):
        tuned = base.clone()
        tuned[599] = value
        _, counted = taskloom.sparse_merge(base, [tuned], select="magnitude", density=0.0, statistics=True)
        assert bool(counted.nonfinite) is expected
        assert counted.kept.tolist() == [0]


def test_statistics_have_no_gradient() -> None:
    base, tuned = checkpoints(5, 3)
    with pytest.raises(RuntimeError, match="sparse_merge: statistics: have no gradient"):
        taskloom.sparse_merge(base.requires_grad_(), tuned, statistics=True)


@pytest.mark.parametrize("tasks", [9, 20])
def test_inner_products_of_many_tasks_are_not_estimated(tasks: int) -> None:
    base, tuned = checkpoints(3001, tasks=tasks)
    _, counted = taskloom.sparse_merge(base, tuned, statistics=True)
    deltas = torch.stack([task - base for task in tuned]).double()
    torch.testing.assert_close(counted.dots, deltas @ deltas.T, rtol=1e-6, atol=1e-4)
