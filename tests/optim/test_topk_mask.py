"""topk_mask and nm_mask beside a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import taskloom
from taskloom.optim import nm_mask, topk_mask


def _ties(*shape: int, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).round()


def _largest(values: Tensor, k: int) -> Tensor:
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.abs().flatten().sort(descending=True, stable=True).indices[:k]] = True
    return mask.view(values.shape)


def test_tensor_row_and_global_scopes() -> None:
    scores = {"a": _ties(7, 31), "b": _ties(5), "c": _ties(3, 4, 5, seed=1)}
    assert torch.equal(topk_mask(scores["a"], 0.3), _largest(scores["a"], int(0.3 * 217)))
    rows = torch.stack([_largest(row, int(0.3 * 31)) for row in scores["a"]])
    assert torch.equal(topk_mask(scores["a"], 0.3, "row"), rows)
    together = topk_mask(scores, 0.2, "global")
    whole = torch.cat([one.flatten() for one in scores.values()])
    expected = _largest(whole, int(0.2 * whole.numel())).split([one.numel() for one in scores.values()])
    for (name, mask), part in zip(together.items(), expected, strict=True):
        assert torch.equal(mask.flatten(), part)
        assert mask.shape == scores[name].shape
    listed = topk_mask(list(scores.values()), 0.2, "global", packed=True)
    for mask, part in zip(listed, expected, strict=True):
        assert torch.equal(mask, taskloom.pack_mask(part))


def test_blocks_and_their_shorter_tail() -> None:
    scores = _ties(4, 19)
    expected = torch.stack([torch.cat([_largest(block, int(0.5 * block.numel())) for block in row.split(8)]) for row in scores])
    assert torch.equal(topk_mask(scores, 0.5, "block", block_size=8), expected)
    assert torch.equal(topk_mask(scores, 0.5, "block", block_size=8, packed=True), taskloom.pack_mask(expected))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (3, 7), (0, 4), (4, 4), (1, 1)])
def test_nm_keeps_n_of_each_m(n: int, m: int) -> None:
    scores = _ties(6, 3 * m)
    expected = torch.stack([_largest(group, n) for group in scores.view(-1, m)]).view(scores.shape)
    assert torch.equal(nm_mask(scores, n, m), expected)
    assert torch.equal(nm_mask(scores.bfloat16(), n, m, packed=True), taskloom.pack_mask(expected))


def test_nm_of_special_values() -> None:
    scores = torch.tensor([torch.nan, torch.inf, 1, -torch.inf, 0, -0.0, 0, 0])
    assert nm_mask(scores).tolist() == [True, True, False, False, True, True, False, False]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="nm_mask: scores: expected a last dimension that is a multiple of 4"):
        nm_mask(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="expected 0 <= n <= m"):
        nm_mask(torch.zeros(4), 5, 4)
    with pytest.raises(TypeError, match="expected float32, bfloat16"):
        nm_mask(torch.zeros(4).int())
    with pytest.raises(ValueError, match="topk_mask: scope: expected one of"):
        topk_mask(torch.zeros(4), 0.5, "column")
    with pytest.raises(ValueError, match="topk_mask: block_size: expected one exactly with"):
        topk_mask(torch.zeros(4), 0.5, "block")
    with pytest.raises(ValueError, match="density"):
        topk_mask(torch.zeros(4), 1.5)
