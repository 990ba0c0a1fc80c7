"""What exact selection by magnitude promises: counts, ties, scopes, symmetries, and thresholds from merged histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import checkpoints, normal, with_specials
from torch import Tensor

import taskloom
from taskloom import MagnitudeThreshold

SHAPES = [(1001,), (37, 29), (3, 5, 7), (1, 1)]


def top_mask(values: Tensor, count: int) -> Tensor:
    order = values.abs().float().flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(values.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3])
def test_counts_are_exact(shape: tuple[int, ...], density: float, gamma: float) -> None:
    values = normal(*shape, dtype=torch.bfloat16).round()
    total, wanted = values.numel(), int(density * values.numel())
    kept = taskloom.magnitude_mask(values, density=density, gamma=gamma, on_overflow="drop")
    assert kept.sum() == min(wanted, total - int(gamma * total))
    kept = taskloom.magnitude_mask(values, density=density, gamma=gamma, on_overflow="density")
    assert kept.sum() == wanted


def test_density_is_the_truncated_product() -> None:
    assert taskloom.magnitude_mask(normal(100), density=0.29).sum() == 28


def test_a_removed_share_that_rounds_to_nothing_removes_nothing() -> None:
    values = normal(64)
    assert taskloom.magnitude_mask(values, density=0.5, gamma=0.01).equal(taskloom.magnitude_mask(values, density=0.5))


@pytest.mark.parametrize("make", [normal, with_specials, lambda *shape: torch.full(shape, -3.0)])
@pytest.mark.parametrize("size", [1001, (1 << 18) + 5])
def test_one_sided_selection_is_a_stable_top_k(make: Callable[..., Tensor], size: int) -> None:
    values = make(size).nan_to_num(torch.inf, torch.inf, -torch.inf)
    for count in (0, 1, size // 3, size - 1, size):
        assert taskloom.magnitude_mask(values, rank=count).equal(top_mask(values, count))


def test_the_sign_of_a_given_threshold_counts_for_nothing() -> None:
    for dtype in (torch.float32, torch.float64):
        values = normal(1001, dtype=dtype)
        cut = torch.tensor(0.5, dtype=dtype)
        masks = [
            taskloom.magnitude_mask(values, threshold=MagnitudeThreshold(threshold, torch.tensor(0)))
            for threshold in (cut, -cut, -0.0 * cut)
        ]
        assert masks[0].equal(values.abs() > 0.5)
        assert masks[1].equal(masks[0])
        assert masks[2].equal(values != 0)


def test_one_row_is_the_tensor() -> None:
    values = normal(1, 1 << 17, dtype=torch.bfloat16)
    ranks = [0, 1, 50_000, 1 << 17]
    row, whole = (taskloom.magnitude_threshold(values, rank=ranks, scope=scope) for scope in ("row", "tensor"))
    assert row.threshold.shape == (1, 4)
    assert row.threshold[0].view(torch.int32).equal(whole.threshold.view(torch.int32))
    assert row.equal_kept[0].equal(whole.equal_kept)


def test_nan_ranks_above_infinity() -> None:
    values = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf, -torch.nan])
    assert taskloom.magnitude_mask(values, rank=2).tolist() == [False, False, True, False, True]
    assert taskloom.magnitude_mask(values, rank=3).tolist() == [False, True, True, False, True]
    assert taskloom.magnitude_threshold(values, rank=1).threshold.isnan()
    assert taskloom.magnitude_threshold(values, rank=4).threshold == torch.inf


def test_rows_are_selected_as_tensors_are() -> None:
    base, (tuned, *_) = checkpoints(11, 53, dtype=torch.float16)
    rows = taskloom.magnitude_mask(tuned, base, density=0.3, gamma=0.05, scope="row")
    each = [taskloom.magnitude_mask(t, b, density=0.3, gamma=0.05) for t, b in zip(tuned, base, strict=True)]
    assert rows.equal(torch.stack(each))
    found = taskloom.magnitude_threshold(tuned, base, rank=[0, 7, 53], scope="row")
    alone = [taskloom.magnitude_threshold(t, b, rank=[0, 7, 53]) for t, b in zip(tuned, base, strict=True)]
    torch.testing.assert_close(found.threshold, torch.stack([one.threshold for one in alone]), rtol=0, atol=0, equal_nan=True)
    assert found.equal_kept.equal(torch.stack([one.equal_kept for one in alone]))


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**9, -1.0])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_masks_do_not_depend_on_scale_by_powers_of_two_nor_on_sign(factor: float, scope: Any) -> None:
    values = normal(31, 33).round(decimals=1)
    mask = taskloom.magnitude_mask(values, density=0.3, gamma=0.1, scope=scope)
    assert taskloom.magnitude_mask(factor * values, density=0.3, gamma=0.1, scope=scope).equal(mask)


@pytest.mark.parametrize("rank", [0, 1, 400, 1000, 1001])
@pytest.mark.parametrize("make", [normal, with_specials])
def test_a_threshold_and_its_ties_give_the_mask(rank: int, make: Callable[..., Tensor]) -> None:
    values = make(1001)
    found = taskloom.magnitude_threshold(values, rank=rank)
    assert found.threshold.shape == found.equal_kept.shape == ()
    assert taskloom.magnitude_mask(values, threshold=found).equal(taskloom.magnitude_mask(values, rank=rank))
    if not values.isnan().any():
        assert (values.abs() > found.threshold).sum() + found.equal_kept == rank


def test_thresholds_of_many_ranks_are_those_of_each() -> None:
    values = normal(1 << 17, dtype=torch.bfloat16)
    ranks = [5, 90_000, 17, 60_000, 1 << 17, 3, 0]
    together = taskloom.magnitude_threshold(values, rank=ranks)
    for number, rank in enumerate(ranks):
        alone = taskloom.magnitude_threshold(values, rank=rank)
        assert together.equal_kept[number] == alone.equal_kept
        assert together.threshold[number].equal(alone.threshold) or rank == 0


@pytest.mark.parametrize("make", [normal, with_specials])
@pytest.mark.parametrize("rank", [0, 1, 700, 1517, 1518])
def test_a_list_is_one_vector(rank: int, make: Callable[..., Tensor]) -> None:
    parts = [make(17), torch.empty(0), make(5, 300).round(), make(1)[0]]
    whole = torch.cat([part.flatten() for part in parts])
    joint = taskloom.magnitude_threshold(parts, rank=rank)
    single = taskloom.magnitude_threshold(whole, rank=rank)
    assert joint.equal_kept == single.equal_kept
    assert joint.threshold.view(torch.int32) == single.threshold.view(torch.int32)
    shares = taskloom.split_threshold(joint, parts)
    masks = [taskloom.magnitude_mask(part, threshold=share).flatten() for part, share in zip(parts, shares, strict=True)]
    assert torch.cat(masks).equal(taskloom.magnitude_mask(whole, rank=rank))


def test_a_list_with_one_wide_tensor_is_compared_in_float64() -> None:
    narrow, wide = torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1.0 + 2**-40, 1.0], dtype=torch.float64)
    found = taskloom.magnitude_threshold([narrow, wide], rank=3)
    assert found == (1.0, 1)
    assert found.threshold.dtype == torch.float64
    shares = taskloom.split_threshold(found, [narrow, wide])
    assert [int(share.equal_kept) for share in shares] == [1, 0]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 333, 999, 1001])
def test_histograms_of_shards_give_the_threshold_of_the_whole(rank: int, wide: bool) -> None:
    dtype = torch.float64 if wide else torch.bfloat16
    base, (tuned, *_) = checkpoints(1001, dtype=dtype)
    pieces = [slice(0, 300), slice(300, 301), slice(301, 1001)]

    def histogram(shift: int, prefix: int) -> Tensor:
        counts = [taskloom.magnitude_histogram(tuned[piece], base[piece], shift=shift, prefix=prefix) for piece in pieces]
        return torch.stack(counts).sum(0)

    found = taskloom.threshold_from_histograms(histogram, rank, wide)
    whole = taskloom.magnitude_threshold(tuned, base, rank=rank)
    torch.testing.assert_close(found, whole, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"threshold_from_histograms: rank: .*1001.*got 1002"):
        taskloom.threshold_from_histograms(histogram, 1002, wide)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"magnitude_threshold: tuned: .*int64", lambda: taskloom.magnitude_threshold(torch.arange(3), rank=1)),
        (TypeError, r"magnitude_threshold: rank: expected int, got float", lambda: taskloom.magnitude_threshold(normal(3), rank=1.0)),
        (ValueError, r"magnitude_threshold: rank: .*<= 3.*got 4", lambda: taskloom.magnitude_threshold(normal(3), rank=4)),
        (ValueError, r"magnitude_threshold: rank: .*got -1", lambda: taskloom.magnitude_threshold(normal(3), rank=-1)),
        (ValueError, r"exactly one of them, got neither", lambda: taskloom.magnitude_threshold(normal(3))),
        (ValueError, r"exactly one of them, got both", lambda: taskloom.magnitude_threshold(normal(3), rank=1, density=0.5)),
        (ValueError, r"density: .*\[0, 1\], got 1.5", lambda: taskloom.magnitude_threshold(normal(3), density=1.5)),
        (ValueError, r"density: .*got nan", lambda: taskloom.magnitude_mask(normal(3), density=float("nan"))),
        (ValueError, r"base: expected shape \(3,\) as tuned, got \(4,\)", lambda: taskloom.magnitude_mask(normal(3), normal(4), rank=1)),
        (
            ValueError,
            r"base: expected 2 tensors as in tuned, got 1",
            lambda: taskloom.magnitude_threshold([normal(3)] * 2, normal(3), rank=1),
        ),
        (ValueError, r'scope: "row" is for one tensor', lambda: taskloom.magnitude_threshold([normal(3)] * 2, rank=1, scope="row")),
        (ValueError, r"scope: expected one of", lambda: taskloom.magnitude_mask(normal(3), rank=1, scope="model")),
        (ValueError, r"at least one tensor", lambda: taskloom.magnitude_threshold([], rank=1)),
        (ValueError, r"rank: .*a row, got 4", lambda: taskloom.magnitude_mask(normal(5, 3), rank=4, scope="row")),
        (ValueError, r"rank: expected begin <= end", lambda: taskloom.magnitude_mask(normal(5), rank=(4, 2))),
        (ValueError, r"gamma: goes with density", lambda: taskloom.magnitude_mask(normal(5), rank=2, gamma=0.1)),
        (
            ValueError,
            r"threshold: expected shape",
            lambda: taskloom.magnitude_mask(normal(5), threshold=MagnitudeThreshold(torch.ones(3), torch.ones(3, dtype=torch.int64))),
        ),
        (
            TypeError,
            r"threshold: .*float64",
            lambda: taskloom.magnitude_mask(normal(5), threshold=taskloom.magnitude_threshold(normal(5).double(), rank=1)),
        ),
        (ValueError, r"shift: expected one of 0, 16, got 8", lambda: taskloom.magnitude_histogram(normal(3), shift=8)),
        (ValueError, r"wide: expected True", lambda: taskloom.magnitude_histogram(normal(3).double(), shift=0, wide=False)),
        (ValueError, r"prefix", lambda: taskloom.magnitude_histogram(normal(3), shift=0, prefix=-1)),
    ],
)
def test_errors_name_op_argument_expected_and_got(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match):
        call()


def test_the_compiled_side_checks_ranks_itself() -> None:
    with pytest.raises(RuntimeError, match="rank"):
        torch.ops.taskloom.magnitude_threshold.default([normal(3)], [], [4], False)
    with pytest.raises(RuntimeError, match="base"):
        torch.ops.taskloom.magnitude_histogram.default(normal(3), normal(2), 16, 0, False)
    with pytest.raises(RuntimeError, match="rank"):
        torch.ops.taskloom.magnitude_mask.default(normal(3), None, 2, 1, False, None, None, False)


def test_a_threshold_has_no_gradient_and_says_so() -> None:
    values = normal(9).requires_grad_()
    found = taskloom.magnitude_threshold(values, rank=3)
    with pytest.raises(RuntimeError, match="magnitude_threshold has no gradient"):
        found.threshold.backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_under_transforms_a_mask_is_that_of_each_and_a_threshold_raises() -> None:
    values = normal(5, 33)
    masks = torch.func.vmap(lambda row: taskloom.magnitude_mask(row, density=0.3))(values)
    assert masks.equal(taskloom.magnitude_mask(values, density=0.3, scope="row"))
    _, tangent = torch.func.jvp(lambda x: x * taskloom.magnitude_mask(x, density=0.3), (values,), (torch.ones_like(values),))
    assert tangent.equal(taskloom.magnitude_mask(values, density=0.3).float())
    with pytest.raises(RuntimeError, match=r"magnitude_threshold does not work under torch\.func's vmap"):
        torch.func.vmap(lambda row: taskloom.magnitude_threshold(row, rank=3).threshold)(values)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole_with_dynamic_shapes() -> None:
    def selected(tuned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = taskloom.magnitude_threshold(tuned, base, density=0.25)
        packed = taskloom.magnitude_mask(tuned, base, density=0.3, gamma=0.1, scope="row", packed=True)
        return found.threshold, packed, taskloom.magnitude_histogram(tuned, base, shift=16)

    compiled = torch.compile(selected, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((9, 33), (12, 31)):
        base, (tuned, *_) = checkpoints(*shape)
        for ours, expected in zip(compiled(tuned, base), selected(tuned, base), strict=True):
            assert ours.equal(expected)
