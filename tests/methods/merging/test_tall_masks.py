"""TALL masks in memory: the vector, the masks and what they restore, against plain numpy; the card's invariants by number."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tall_states import TOY, State, Toy, floats, grid_models, make_base, make_models, make_tuned, same
from torch import Tensor

from taskloom import TaskVector
from taskloom.merge import merge_state_dicts
from taskloom.methods.merging.tall_masks import (
    LAMBDA_GRID,
    PackedMask,
    TallArchive,
    magnitude_masks,
    merge_consensus,
    multi_task_vector,
    restore_task,
    select_lambda,
    tall_masks,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Array = np.ndarray[Any, np.dtype[Any]]


def _numpy_mask(base: Array, tuned: Array, vector: Array, threshold: float) -> Array:
    delta = tuned - base
    mask: Array = np.abs(delta) > vector.dtype.type(threshold) * np.abs(vector - delta)
    return mask


def _numpy_ties(base: dict[str, Array], tuned: list[dict[str, Array]], share: float) -> dict[str, Array]:
    names = sorted(base)
    trimmed = []
    for state in tuned:
        delta = np.concatenate([(state[name] - base[name]).reshape(-1) for name in names])
        kept = np.argsort(-np.abs(delta), kind="stable")[: max(1, int(share * delta.size))]
        trimmed.append(np.where(np.isin(np.arange(delta.size), kept), delta, 0).astype(delta.dtype))
    signs = np.sign(sum(trimmed))
    signs[signs == 0] = -1 if signs.sum() < 0 else 1
    merged = sum(np.where(np.sign(values) == signs, values, 0).astype(values.dtype) for values in trimmed)
    split = np.split(np.asarray(merged), np.cumsum([base[name].size for name in names])[:-1])
    return {name: part.reshape(base[name].shape) for name, part in zip(names, split, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_invariant_7_masks_and_restored_weights_are_the_naive_formula_s(dtype: torch.dtype) -> None:
    base, tuned = make_models(3, dtype)
    tau = multi_task_vector(base, tuned)
    masks = tall_masks(base, tuned, tau, {"task-0": 0.2, "task-1": 0.4, "task-2": 1.0})
    origins = floats(base)
    for number, (task, state) in enumerate(tuned.items()):
        restored, own = restore_task(base, tau, masks[task]), floats(state)
        assert list(restored) == list(base)
        for name, origin in origins.items():
            total = np.zeros_like(origin)
            for one in tuned.values():
                total = total + (floats(one)[name] - origin)
            np.testing.assert_array_equal(tau[name].numpy(), total, strict=True)
            mask = _numpy_mask(origin, own[name], total, (0.2, 0.4, 1.0)[number])
            np.testing.assert_array_equal(masks[task].unpack()[name].numpy(), mask, strict=True)
            expected = torch.from_numpy(np.where(mask, origin + total, origin)).to(dtype)
            assert torch.equal(restored[name], expected)
        assert torch.equal(restored["position_ids"], base["position_ids"])


@pytest.mark.parametrize(("share", "shift"), [(0.01, None), (0.2, None), (1.0, None), (0.2, 0.0), (0.3, -1.0)])
def test_ties_vector(share: float, shift: float | None) -> None:
    base, tuned = make_models(3) if shift is None else grid_models(4, shift)
    tau = multi_task_vector(base, tuned, "ties", share)
    for name, expected in _numpy_ties(floats(base), [floats(state) for state in tuned.values()], share).items():
        np.testing.assert_array_equal(tau[name].numpy(), expected, strict=True)
        assert not np.signbit(tau[name].numpy()[expected == 0]).any()


@pytest.mark.parametrize("weight", [1.0, {"task-0": 0.5, "task-1": -1.5, "task-2": 2.0}])
def test_ties_vector_is_that_of_consensus_ties(weight: float | dict[str, float]) -> None:
    base, tuned = make_models(3)
    tau = multi_task_vector(base, tuned, "ties", 0.3, weight=weight)
    given = list(weight.values()) if isinstance(weight, dict) else weight
    merged = merge_state_dicts(base, tuned, "consensus_ties", weight=given, density=0.3, consensus_k=0, lambda_=1.0)
    assert all(torch.equal(base[name] + values, merged[name]) for name, values in tau.items())


def test_invariant_1_one_task_comes_back() -> None:
    base, tuned = make_models(1, share=0.5)
    tau = multi_task_vector(base, tuned)
    mask = tall_masks(base, tuned, tau)["task-0"]
    for name, values in restore_task(base, tau, mask).items():
        own = tuned["task-0"][name]
        if name in tau:
            assert torch.equal(mask.unpack()[name], tau[name] != 0)
            exact = base[name] + (own - base[name]) == own
            assert torch.equal(values[exact], own[exact])
        torch.testing.assert_close(values, own, rtol=2**-23, atol=2**-24)


@pytest.mark.parametrize("threshold", [0.01, 0.4, 7.0])
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_invariant_2_disjoint_supports_come_back(threshold: float, method: Any) -> None:
    base = make_base()
    owner = {name: torch.randint(0, 3, values.shape, generator=torch.Generator().manual_seed(2)) for name, values in base.items()}
    tuned: dict[str, State] = {}
    for number in range(3):
        moved = make_tuned(base, number)
        tuned[f"task-{number}"] = {name: torch.where(owner[name] == number, moved[name], values) for name, values in base.items()}
    tau = multi_task_vector(base, tuned, method, 1.0)
    for task, mask in tall_masks(base, tuned, tau, threshold).items():
        for name, values in restore_task(base, tau, mask).items():
            torch.testing.assert_close(values, tuned[task][name], rtol=1e-6, atol=1e-7)
            if name in tau:
                assert torch.equal(mask.unpack()[name], tuned[task][name] != base[name])


def test_invariant_3_no_other_mask_is_nearer_at_lambda_one() -> None:
    base, tuned = make_models(4, torch.float64)
    tau = multi_task_vector(base, tuned)
    generator = torch.Generator().manual_seed(3)
    for task, mask in tall_masks(base, tuned, tau, 1.0).items():

        def distance(one: PackedMask, own: State = tuned[task]) -> float:
            return sum(float((values - own[name]).abs().sum()) for name, values in restore_task(base, tau, one).items() if name in tau)

        optimum = 0.0
        for name, values in tau.items():
            delta = tuned[task][name] - base[name]
            optimum += float(torch.minimum(delta.abs(), (values - delta).abs()).sum())
        found = distance(mask)
        assert found == pytest.approx(optimum, rel=1e-6)
        for share in (0.1, 0.5, 0.9):
            other = PackedMask.pack({name: torch.rand(values.shape, generator=generator) < share for name, values in tau.items()})
            assert distance(other) >= found
            assert distance(mask | other) >= found
            assert distance(mask & other) >= found


def test_invariant_4_masks_shrink_as_lambda_grows() -> None:
    base, tuned = make_models(3)
    tau = multi_task_vector(base, tuned)
    found = [tall_masks(base, tuned, tau, threshold)["task-1"] for threshold in (0.05, *LAMBDA_GRID, 1.0, 3.0)]
    for looser, stricter in pairwise(found):
        assert looser & stricter == stricter
        assert looser | stricter == looser
    assert found[0].density() > found[-1].density()


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 4097])
def test_invariant_6_packing(numel: int) -> None:
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    packed = PackedMask.pack({"a": mask, "b": mask.reshape(1, -1)})
    assert packed.nbytes == 2 * -(-numel // 8)
    assert np.array_equal(np.unpackbits(packed.bits["a"].numpy(), bitorder="little")[:numel], mask.numpy())
    assert all(torch.equal(values.reshape(-1), mask) for values in packed.unpack().values())
    assert packed.unpack()["b"].shape == (1, numel)
    assert packed.density() == float(mask.double().mean())
    assert (packed.count(), packed.numel) == (2 * int(mask.sum()), 2 * numel)


def test_masks_are_compared_and_combined() -> None:
    a, b = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    left, right = PackedMask.pack({"w": a}), PackedMask.pack({"w": b})
    assert left & right == PackedMask.pack({"w": a & b})
    assert left | right == PackedMask.pack({"w": a | b})
    assert left != right
    assert left != PackedMask.pack({"w": a[None]})
    assert left != PackedMask.pack({"v": a})
    assert left != "w"
    with pytest.raises(TypeError, match="unhashable"):
        hash(left)
    other: Any = a
    with pytest.raises(TypeError, match="unsupported operand"):
        other & left
    with pytest.raises(KeyError, match="expected those of the same tensors"):
        left & PackedMask.pack({"v": a})
    with pytest.raises(ValueError, match=r"'w': expected one shape, got \(3,\) and \(1, 3\)"):
        left | PackedMask.pack({"w": a[None]})


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        (torch.tensor([8], dtype=torch.uint8), ValueError, "expected zeros after the last of 3 entries"),
        (torch.tensor([1, 0], dtype=torch.uint8), ValueError, r"expected 1 bytes for 3 entries, got shape \(2,\)"),
        (torch.tensor([1]), TypeError, "expected packed bits as uint8, got torch.int64"),
    ],
)
def test_bits_that_are_no_mask(bits: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedMask({"w": bits}, {"w": (3,)})
    with pytest.raises(KeyError, match="bits and shapes of the same tensors"):
        PackedMask({"w": bits}, {"v": (3,)})
    with pytest.raises(TypeError, match=r"'w': expected a bool tensor, got torch.uint8"):
        PackedMask.pack({"w": torch.zeros(3, dtype=torch.uint8)})


def test_lambda_is_the_best_and_the_smallest_of_ties() -> None:
    base, tuned = make_models(3)
    tau = multi_task_vector(base, tuned)
    wanted = {
        task: restore_task(base, tau, mask)
        for task, mask in tall_masks(base, tuned, tau, {"task-0": 0.5, "task-1": 0.2, "task-2": 0.6}).items()
    }
    seen: list[str] = []

    def closeness(task: str, state: dict[str, Tensor]) -> float:
        seen.append(task)
        return -sum(float((state[name] - values).abs().sum()) for name, values in wanted[task].items())

    assert select_lambda(base, tuned, tau, closeness) == {"task-0": 0.5, "task-1": 0.2, "task-2": 0.6}
    assert seen == [task for task in tuned for _ in LAMBDA_GRID]
    assert select_lambda(base, tuned, tau, lambda task, state: 1.0, grid=(0.6, 0.3)) == dict.fromkeys(tuned, 0.3)
    with pytest.raises(ValueError, match=r"task 'task-0', tall_mask_lambda 0.2: expected a score, got NaN"):
        select_lambda(base, tuned, tau, lambda task, state: float("nan"))
    for grid in ((), (0.2, 0.0), (float("inf"),)):
        with pytest.raises(ValueError, match="grid: expected"):
            select_lambda(base, tuned, tau, closeness, grid)


@pytest.mark.parametrize("of_base", [True, False])
def test_evaluate_must_not_load_into_the_models(of_base: bool) -> None:
    base = torch.nn.Linear(5, 3)
    tuned = torch.nn.Linear(5, 3)
    module = base if of_base else tuned

    def load(task: str, state: dict[str, Tensor]) -> float:
        module.load_state_dict(state)
        return 1.0

    tau = multi_task_vector(base, {"one": tuned})
    with pytest.raises(ValueError, match="evaluate: task 'one': expected base and fine-tuned models to stay as they are"):
        select_lambda(base, {"one": tuned}, tau, load)


def test_task_vectors_are_of_one_regime() -> None:
    base, tuned = make_models(2)
    vectors = {task: TaskVector(base, state) for task, state in tuned.items()}
    vectors["task-1"] = vectors["task-1"].as_regime("linear")
    with pytest.raises(ValueError, match="finetuned: expected task vectors of one regime, got both"):
        multi_task_vector(base, vectors)


def test_values_too_large_for_their_dtype() -> None:
    base = {"w": torch.full((9,), 6e4, dtype=torch.float16)}
    tuned = {task: {"w": torch.full((9,), 6.3e4, dtype=torch.float16)} for task in ("a", "b")}
    tau = multi_task_vector(base, tuned)
    for call in (
        lambda: restore_task(base, tau, tall_masks(base, tuned, tau)["a"]),
        lambda: TallArchive.build(base, tuned),
        lambda: TallArchive.build({"w": base["w"].float()}, {"a": tuned["a"], "b": tuned["b"]}),
    ):
        with pytest.raises(ValueError, match=r"tensor 'w': base \+ vector overflows torch\.float16"):
            call()
    with pytest.raises(ValueError, match=r"tensor 'w': a merged value is too large for torch\.float16"):
        merge_consensus(base, tuned, lambda_=1.0)


def test_bad_vectors() -> None:
    base, tuned = make_models(2)
    tau = multi_task_vector(base, tuned)
    with pytest.raises(TypeError, match=r"tau: 'norm': expected float32 or float64, got torch\.bfloat16"):
        tall_masks(base, tuned, {**tau, "norm": tau["norm"].bfloat16()})
    with pytest.raises(ValueError, match="tau: 'norm' holds NaN or infinity"):
        tall_masks(base, tuned, {**tau, "norm": torch.full((9,), float("nan"))})


def test_magnitude_masks_keep_the_largest_of_the_whole_model() -> None:
    base, tuned = make_models(2)
    for task, mask in magnitude_masks(base, tuned, 0.1).items():
        assert mask.count() == int(0.1 * mask.numel)
        kept, left = [], []
        for name, bits in mask.unpack().items():
            moved = (tuned[task][name] - base[name]).abs()
            kept.append(moved[bits])
            left.append(moved[~bits])
        assert torch.cat(kept).min() >= torch.cat(left).max()
    assert magnitude_masks(base, tuned, 1e-9)["task-0"].count() == 1
    with pytest.raises(ValueError, match="share: expected above 0 and at most 1, got 0"):
        magnitude_masks(base, tuned, 0)


@pytest.mark.parametrize("method", ["sum", "ties"])
def test_modules_and_task_vectors_give_the_same_bits(method: Any) -> None:
    modules = {f"task-{number}": Toy() for number in range(3)}
    base = Toy()
    for seed, module in enumerate((base, *modules.values())):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    states = {task: dict(module.state_dict()) for task, module in modules.items()}
    vectors = {task: TaskVector(base, module) for task, module in modules.items()}
    mixed = {"task-0": states["task-0"], "task-1": vectors["task-1"], "task-2": modules["task-2"]}
    tau = multi_task_vector(dict(base.state_dict()), states, method)
    masks = tall_masks(base, states, tau)
    for finetuned in (modules, vectors, mixed):
        assert same(multi_task_vector(base, finetuned, method), tau)
        assert tall_masks(base, finetuned, tau) == masks
        assert magnitude_masks(base, finetuned, 0.2) == magnitude_masks(base, states, 0.2)
    assert not any(values.requires_grad for values in tau.values())
    assert set(TOY) < set(base.state_dict())


def test_bfloat16_changes_are_taken_in_float32() -> None:
    base = {"w": torch.ones(64, dtype=torch.bfloat16)}
    tuned = {str(number): {"w": torch.full((64,), 1 + 2.0**-number)} for number in range(1, 20)}
    tau = multi_task_vector(base, tuned)
    assert tau["w"].dtype == torch.float32
    assert torch.equal(tau["w"], torch.full((64,), 1 - 2.0**-19))


def test_masks_of_the_sum_on_a_ties_vector_restore_worse() -> None:
    """A pitfall of the card: masks are built from the vector that they are applied to."""
    base, tuned = make_models(4)
    total, ties = multi_task_vector(base, tuned), multi_task_vector(base, tuned, "ties")
    right, wrong = tall_masks(base, tuned, ties, 1.0), tall_masks(base, tuned, total, 1.0)
    for task, state in tuned.items():
        errors = []
        for mask in (right[task], wrong[task]):
            restored = restore_task(base, ties, mask)
            errors.append(sum(float((restored[name] - state[name]).abs().sum()) for name in ties))
        assert errors[0] < errors[1]


def test_tied_weights_count_once() -> None:
    base, tuned = make_models(3)
    shared = {task: {**state, "a head": state["embed.weight"]} for task, state in tuned.items()}
    tau = multi_task_vector({**base, "a head": base["embed.weight"]}, shared, "ties", 0.3)
    alone = multi_task_vector(base, tuned, "ties", 0.3)
    assert torch.equal(tau["a head"], alone["embed.weight"])
    assert all(torch.equal(tau[name], values) for name, values in alone.items())
    masks = magnitude_masks({**base, "a head": base["embed.weight"]}, shared, 0.3)
    assert torch.equal(masks["task-0"].bits["a head"], masks["task-0"].bits["embed.weight"])


def test_recomputed_buffers_have_no_mask() -> None:
    base, tuned = make_models(2)
    name = "rotary_emb.inv_freq"
    found = multi_task_vector({**base, name: torch.ones(3)}, {task: {**state, name: torch.zeros(3)} for task, state in tuned.items()})
    assert name not in found


def test_the_inputs_are_left_alone() -> None:
    base, tuned = make_models(3)
    before = (
        {name: values.clone() for name, values in base.items()},
        {task: {name: values.clone() for name, values in state.items()} for task, state in tuned.items()},
    )
    tau = multi_task_vector(base, tuned, "ties", weight=2.0)
    restored = restore_task(base, tau, tall_masks(base, tuned, tau)["task-0"])
    for values in restored.values():
        values.zero_()
    assert same(base, before[0])
    assert all(same(state, before[1][task]) for task, state in tuned.items())


def _changed(change: Callable[[State], None]) -> Callable[[State, dict[str, State]], None]:
    return lambda base, tuned: change(tuned["task-1"])


def _set(name: str, values: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name: values})


BAD = [
    (lambda base, tuned: tuned.clear(), ValueError, "finetuned: expected at least one task, got none"),
    (_changed(lambda state: state.pop("norm")), KeyError, "task 'task-1': expected the base's tensors; it lacks 'norm'"),
    (_changed(_set("more", torch.zeros(2))), KeyError, "task 'task-1': .* it has 'more' besides"),
    (_changed(_set("norm", torch.zeros(8))), ValueError, r"tensor 'norm': expected shape \(9,\) as in the base, got \(8,\)"),
    (_changed(_set("norm", torch.full((9,), float("nan")))), ValueError, "task 'task-1': tensor 'norm' holds NaN or infinity"),
    (_changed(_set("norm", torch.full((9,), float("inf")))), ValueError, "task 'task-1': tensor 'norm' holds NaN or infinity"),
    (
        _changed(_set("norm", torch.zeros(9, dtype=torch.int64))),
        TypeError,
        "'norm': expected floating point as in the base, got torch.int64",
    ),
    (_changed(_set("position_ids", torch.ones(6, dtype=torch.int64))), ValueError, "tensor 'position_ids' differs from the base's; only"),
    (_changed(_set("norm", torch.zeros(9, device="meta"))), ValueError, "'norm': expected it on cpu as in the base, got meta"),
    (lambda base, tuned: base.update(norm=torch.full((9,), float("nan"))), ValueError, "base: tensor 'norm' holds NaN or infinity"),
    (lambda base, tuned: tuned.update({"task-1": 3}), TypeError, "task 'task-1': expected a state dict or an nn.Module, got int"),
    (lambda base, tuned: tuned["task-1"].update(norm=3), TypeError, "task 'task-1': 'norm': expected a tensor, got int"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_models(change: Callable[[State, dict[str, State]], None], error: type[Exception], message: str) -> None:
    base, tuned = make_models(3)
    tau = multi_task_vector(base, tuned)
    change(base, tuned)
    for call in (
        lambda: multi_task_vector(base, tuned),
        lambda: tall_masks(base, tuned, tau),
        lambda: magnitude_masks(base, tuned),
        lambda: select_lambda(base, tuned, tau, lambda task, state: 0.0),
    ):
        with pytest.raises(error, match=message):
            call()


def test_bad_arguments() -> None:
    base, tuned = make_models(2)
    words: Any = {"task-0": 0.4, "task-1": "0.4"}
    mean: Any = "mean"
    listed: Any = [tuned["task-0"]]
    tau = multi_task_vector(base, tuned)
    for threshold in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="tall_mask_lambda: expected"):
            tall_masks(base, tuned, tau, threshold)
    with pytest.raises(
        KeyError, match=r"tall_mask_lambda: expected a number for each of the tasks 'task-0', 'task-1', got them for 'task-0'"
    ):
        tall_masks(base, tuned, tau, {"task-0": 0.4})
    with pytest.raises(TypeError, match="tall_mask_lambda: expected a number or a mapping from tasks to numbers, got str"):
        tall_masks(base, tuned, tau, words)
    with pytest.raises(TypeError, match=r"tau: tensor 'position_ids' is torch.int64; only floating-point tensors"):
        tall_masks(base, tuned, {**tau, "position_ids": torch.zeros(6)})
    with pytest.raises(KeyError, match="tau: expected the tensors"):
        tall_masks(base, tuned, {name: values for name, values in tau.items() if name != "norm"})
    with pytest.raises(ValueError, match=r"tau: 'norm': expected shape \(9,\), got \(3, 3\)"):
        tall_masks(base, tuned, {**tau, "norm": tau["norm"].reshape(3, 3)})
    with pytest.raises(ValueError, match="method: expected 'sum' or 'ties', got 'mean'"):
        multi_task_vector(base, tuned, mean)
    for trim in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="trim: expected a share above 0 and at most 1"):
            multi_task_vector(base, tuned, "ties", trim)
    with pytest.raises(ValueError, match="base: expected at least one floating-point tensor, got none"):
        multi_task_vector({"n": torch.arange(3)}, {"a": {"n": torch.arange(3)}})
    with pytest.raises(TypeError, match="finetuned: expected a mapping from tasks"):
        multi_task_vector(base, listed)
    with pytest.raises(TypeError, match=r"base: expected a state dict or an nn.Module, got a TaskVector"):
        multi_task_vector(TaskVector(base, tuned["task-0"]), tuned)
    with pytest.raises(ValueError, match="tensor 'w': the sum of the tasks' differences from the base overflows"):
        multi_task_vector({"w": torch.zeros(2)}, {str(number): {"w": torch.full((2,), 3e38)} for number in range(2)})
    with pytest.raises(ValueError, match="float64 in all tensors or in none"):
        multi_task_vector({**base, "wide": torch.zeros(2).double()}, {"a": {**tuned["task-0"], "wide": torch.ones(2).double()}}, "ties")


def test_restoring_needs_parts_of_one_model() -> None:
    base, tuned = make_models(2)
    tau = multi_task_vector(base, tuned)
    mask = tall_masks(base, tuned, tau)["task-0"]
    with pytest.raises(KeyError, match="restore_task: expected tau and mask of the same tensors of the base"):
        restore_task(base, {"norm": tau["norm"]}, mask)
    with pytest.raises(KeyError, match="restore_task: expected tau and mask of the same tensors of the base"):
        restore_task({"norm": base["norm"]}, tau, mask)
    with pytest.raises(ValueError, match=r"restore_task: 'norm': expected floating point of shape \(9,\)"):
        restore_task({**base, "norm": torch.zeros(3)}, tau, mask)
