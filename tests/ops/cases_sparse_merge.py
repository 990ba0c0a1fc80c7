"""Contracts of sparse_merge, of its form that writes into a tensor, and of the one that counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from contract import Case, Contract
from samples import checkpoints, normal, with_specials
from torch import Tensor

import taskloom

TIES = {"select": "magnitude", "density": 0.3, "elect": "sign_sum", "combine": "disjoint_mean"}
BREADCRUMBS = {"select": "magnitude", "density": 0.3, "gamma": 0.05}
DELLA = {"select": "rank_dropout", "density": 0.5, "epsilon": 0.2, "rescale": "density", "seed": 2**63 + 5, "key": "layer.weight"}


def merge_cases() -> Iterator[Case]:
    base, tuned = checkpoints(37, 29)
    low, low_tuned = checkpoints(37, 29, dtype=torch.bfloat16)
    yield Case("sum", (base, tuned, 0.4))
    yield Case("ties", (low, low_tuned, [1.0, 0.5, 0.7]), TIES)
    yield Case("ties by count", (base, tuned), {**TIES, "elect": "sign_count", "zero_sign": "negative"})
    yield Case("ties of one tensor", (low, low_tuned), {**TIES, "zero_sign": "majority"})
    yield Case("breadcrumbs", (low, low_tuned, 0.3), {**BREADCRUMBS, "density": [0.3, 0.9, 1.0]})
    yield Case("breadcrumbs of rows", (base, tuned, 0.3), {**BREADCRUMBS, "scope": "row", "on_overflow": "drop"})
    yield Case("ranks", (low, low_tuned, 0.3), {"select": "magnitude", "rank": [(10, 300), 500, (0, 0)], "elect": "sign_sum"})
    yield Case("dare", (base, tuned, 0.5), {"select": "dropout", "density": [0.2, 0.5, 1.0], "rescale": "density", "seed": 7})
    yield Case("dare l1", (base, tuned, 0.5), {"select": "dropout", "density": 0.3, "rescale": "l1", "elect": "sign_sum"})
    yield Case("della", (base, tuned, 0.5), DELLA)
    yield Case("della of columns of one", (base[:, :1], [task[:, :1] for task in tuned]), DELLA)
    yield Case("masks", (base, tuned, 0.5), {"select": "mask", "masks": [task > 0 for task in tuned], "rescale": "l1"})
    yield Case("consensus", (base, tuned), {"vote": "tall", "consensus_k": 2, "tall_mask_lambda": [0.2, 0.4, 0.6]})
    yield Case("selected by two", (base, tuned), {**BREADCRUMBS, "vote": "selected", "consensus_k": 2})
    yield Case("no base", (None, tuned, [0.5, 0.25, 0.25]), {"combine": "weighted_mean"})
    yield Case("weights of zero sum", (None, tuned, [0.5, -0.25, -0.25]), {"combine": "weighted_mean", "scale": -0.5})
    yield Case("float16", (base.half(), [task.half() for task in tuned], 0.4), TIES)
    yield Case("float64", (base.double(), [task.double() for task in tuned], 0.4), TIES)
    yield Case("mixed", (low, [tuned[0], tuned[1].half(), tuned[2].double()], 0.4), {**TIES, "out_dtype": torch.float32})
    yield Case("non-contiguous", (base.t(), [task.t() for task in tuned], 0.4), TIES)
    yield Case("offset", (base[1::2], [task[::2][:18] for task in tuned], 0.4), {**BREADCRUMBS, "scope": "row"})
    yield Case("empty", (torch.empty(3, 0), [torch.empty(3, 0)]), {**BREADCRUMBS, "scope": "row"})
    yield Case("no rows", (torch.empty(0, 7), [torch.empty(0, 7)]), {**BREADCRUMBS, "scope": "row"})
    yield Case("scalar", (torch.tensor(1.0), [torch.tensor(3.0), torch.tensor(0.0)]), {**TIES, "density": 1.0})
    yield Case("ties of equal magnitude", (torch.zeros(1001), [torch.ones(1001), -torch.ones(1001)], [1.0, 0.5]), BREADCRUMBS)
    for select in (BREADCRUMBS, TIES, DELLA):
        yield Case(f"specials {select['select']} {select.get('elect', 'none')}", (normal(9, 40), [with_specials(9, 40)]), select)
    many = checkpoints(301, tasks=64)
    yield Case("64 tasks", many, TIES)
    yield Case("64 votes", many, {**BREADCRUMBS, "vote": "selected", "consensus_k": 20})
    size = (1 << 18) + 1000
    yield Case("large", checkpoints(3, size // 3, dtype=torch.bfloat16, tasks=2), {**TIES, "scope": "row", "rescale": "l1"})
    cuts = [taskloom.magnitude_threshold(task, base, rank=[10, 300]) for task in tuned]
    yield Case("thresholds", (base, tuned), {"select": "magnitude", "threshold": cuts, "elect": "sign_sum"})


def merge_into(out: Tensor, base: Tensor | None, tuned: Sequence[Tensor], *settings: Any, **named: Any) -> Tensor:
    return taskloom.sparse_merge(base, tuned, *settings, **named, out=out)


def merge_into_cases() -> Iterator[Case]:
    for case in merge_cases():
        if case.name in ("ties", "della", "no base", "empty", "scalar", "mixed"):
            dtype = case.kwargs.get("out_dtype", (case.args[0] if case.args[0] is not None else case.args[1][0]).dtype)
            yield Case(case.name, (torch.full(case.args[1][0].shape, torch.nan, dtype=dtype), *case.args), case.kwargs)
    base, tuned = checkpoints(37, 29)
    yield Case("non-contiguous out", (torch.full((29, 37), torch.nan).t(), base, tuned), TIES)
    yield Case("strided out", (torch.full((37, 58), torch.nan, dtype=torch.bfloat16)[:, ::2], base, tuned), BREADCRUMBS)


def merge_counting(base: Tensor | None, tuned: Sequence[Tensor], *settings: Any, **named: Any) -> tuple[Tensor, ...]:
    merged, counted = taskloom.sparse_merge(base, tuned, *settings, **named, statistics=True)
    # Parts of the inner products are sums in the precision of the deltas.
    return merged, *counted._replace(dots=counted.dots.float())


def merge_counting_cases() -> Iterator[Case]:
    yield from (case for case in merge_cases() if case.name != "large")
    base, tuned = checkpoints(37, 29)
    yield Case("into one of its tensors", (base, tuned), {**TIES, "zero_sign": "majority", "out": base})
    yield Case("overflow", (torch.full((700,), -2e38), [torch.full((700,), 2e38), torch.zeros(700)]), {})


CONTRACTS = (
    Contract("sparse_merge", taskloom.sparse_merge, merge_cases),
    Contract("sparse_merge_out", merge_into, merge_into_cases, mutates=(0,)),
    Contract("sparse_merge_statistics_out", merge_counting, merge_counting_cases),
)
