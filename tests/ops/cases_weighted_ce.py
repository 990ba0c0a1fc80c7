"""Contracts of weighted_ce and its backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from contract import Case, Contract
from samples import weights as normal

import taskloom
from taskloom.ops.masked import weighted_ce_backward

IGNORED = -100


def row_weights(rows: int, share: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights between 1 and 2 of about a share of the rows, the first among them; 0 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 1 + torch.rand(rows, generator=generator)
    supervised = torch.rand(rows, generator=generator) < share
    supervised[:1] = True
    return torch.where(supervised, drawn, 0).to(dtype)


def words(rows: int, vocabulary: int, weights: torch.Tensor | None = None, seed: int = 0) -> torch.Tensor:
    """Random targets; where a weight is 0, numbers of no word."""
    drawn = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    return drawn if weights is None else torch.where(weights > 0, drawn, IGNORED - 1)


def head(vocabulary: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return normal(vocabulary, width, seed=seed, dtype=dtype, scale=width**-0.5)


def _rows(
    rows: int, width: int, vocabulary: int, share: float = 0.5, dtype: torch.dtype = torch.float32, like: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    weights = row_weights(rows, share)
    return normal(rows, width, dtype=dtype), head(vocabulary, width, like or dtype), words(rows, vocabulary, weights), weights


def weighted_ce_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield Case(f"{dtype}", _rows(13, 17, 41, dtype=dtype))
    yield Case("bfloat16 hidden, float32 head", _rows(9, 16, 33, dtype=torch.bfloat16, like=torch.float32))
    yield Case("float32 hidden, float16 head", _rows(9, 16, 33, dtype=torch.float32, like=torch.float16))
    yield Case("float32 hidden, float64 head", _rows(9, 16, 33, dtype=torch.float32, like=torch.float64))
    yield Case("several tiles", _rows(301, 24, 1057, share=0.9))
    yield Case("several tiles of bfloat16", _rows(70, 24, 1057, share=0.9, dtype=torch.bfloat16))
    yield Case("every row", (normal(20, 8), head(30, 8), words(20, 30)))
    yield Case("one row of one word", (normal(1, 3), head(1, 3), words(1, 1), torch.tensor([2.0])))
    yield Case("no width", (torch.empty(4, 0), torch.empty(5, 0), words(4, 5), row_weights(4)))
    strided = normal(8, 50).t()[::2, 1::2], torch.arange(50)[::2] % 37, row_weights(50)[::2]
    yield Case("transposed head", (strided[0], head(4, 37).t(), *strided[1:]))
    yield Case("strided head", (strided[0], head(74, 8)[::2, ::2], *strided[1:]))
    supervised = row_weights(12)
    yield Case("logits", (normal(12, 41), None, words(12, 41, supervised), supervised))
    yield Case("logits of bfloat16", (normal(12, 1057, dtype=torch.bfloat16), None, words(12, 1057, supervised), supervised))
    yield Case("logits of -inf", (normal(3, 9).masked_fill(torch.arange(9) > 4, -torch.inf), None, words(3, 5), row_weights(3)))
    leaf, leaf_head, targets, some = _rows(11, 6, 19)
    yield Case("gradient", (leaf.requires_grad_(), leaf_head.requires_grad_(), targets, some))


def backward_cases() -> Iterator[Case]:
    for case in weighted_ce_cases():
        hidden, weight, targets, *some = case.args
        hidden, weight = hidden.detach(), None if weight is None else weight.detach()
        dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype if weight is not None else None) else torch.float32
        logits = hidden.to(dtype) if weight is None else hidden.to(dtype) @ weight.to(dtype).t()
        coefficient = some[0].to(dtype) if some else torch.ones(len(hidden), dtype=dtype)
        signs = 1 - 2 * (torch.arange(len(hidden)) % 2)
        yield Case(case.name, (hidden, weight, targets, coefficient * signs, logits.logsumexp(1)))
    hidden, weight, targets, _ = _rows(11, 6, 19)
    nothing, sums = torch.zeros(11), torch.full((11,), torch.nan)
    yield Case("no row", (hidden, weight, targets, nothing, sums))
    yield Case("no rows", (hidden[:0], weight, targets[:0], nothing[:0], sums[:0]))
    sums = (hidden @ weight.t()).logsumexp(1)
    targets = words(11, 19)
    yield Case("hidden alone", (hidden, weight, targets, normal(11), sums), {"for_weight": False})
    yield Case("head alone", (hidden, weight, targets, normal(11), sums), {"for_hidden": False})


CONTRACTS = (
    Contract("weighted_ce", partial(taskloom.weighted_ce, return_log_probs=True), weighted_ce_cases),
    Contract("weighted_ce_backward", weighted_ce_backward, backward_cases),
)
