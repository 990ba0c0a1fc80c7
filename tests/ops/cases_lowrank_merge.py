"""Contracts of lowrank_merge and its kin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from contract import Case, Contract
from samples import weights

import taskloom
from taskloom.ops.lowrank import lowrank_merge_backward

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def factors(
    rows: int, columns: int, ranks: Sequence[int], dtype: torch.dtype = F32, seed: int = 10
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A [r, columns] and B [rows, r] for each rank."""
    right = [weights(rank, columns, seed=seed + 2 * place, dtype=dtype, scale=0.3) for place, rank in enumerate(ranks)]
    left = [weights(rows, rank, seed=seed + 1 + 2 * place, dtype=dtype, scale=0.3) for place, rank in enumerate(ranks)]
    return right, left


def merge_cases() -> Iterator[Case]:
    yield Case("one", (weights(7, 9), *(one[0] for one in factors(7, 9, [3]))), {"scale": 0.5})
    for base, factor in ((F32, F16), (BF16, BF16), (F16, F32), (F32, F64), (BF16, F64)):
        yield Case(f"{base}-{factor}", (weights(29, 131, dtype=base), *factors(29, 131, [1, 5, 2], factor), [0.5, -2.0, 0.1]))
    yield Case("rows scaled", (weights(53, 70, dtype=BF16), *factors(53, 70, [4]), 0.3), {"row_scale": weights(53, seed=3)})
    yield Case("two pieces", (weights(61, 5003), *factors(61, 5003, [2, 3])))
    yield Case("wide rank", (weights(5, 66), *factors(5, 66, [67, 40]), torch.tensor([0.2, 0.1])))
    strided = (weights(31, 40)[:, ::2], [weights(20, 3, seed=1).t()], [weights(31, 8, seed=2)[:, 1:4]])
    yield Case("strided", strided)
    yield Case("row view", (weights(60, 50)[10:40, 5:45], *factors(30, 40, [4])))
    yield Case("transposed", (weights(40, 31).t(), *factors(31, 40, [4])))
    yield Case("expanded", (weights(1, 40).expand(31, 40), *factors(31, 40, [4])))
    yield Case("no adapter", (weights(5, 6), [], []))
    yield Case("rank 0", (weights(5, 6), *factors(5, 6, [0, 2])))
    yield Case("no rows", (weights(0, 6), *factors(0, 6, [2])))
    yield Case("no columns", (weights(5, 0), *factors(5, 0, [2])))


def differentiable_cases() -> Iterator[Case]:
    yield from merge_cases()
    right, left = factors(12, 17, [2, 3])
    leaves = [one.requires_grad_() for one in (*right, *left)]
    weight, scale = weights(2, seed=5).requires_grad_(), weights(12, seed=6).requires_grad_()
    yield Case("gradient", (weights(12, 17).requires_grad_(), leaves[:2], leaves[2:], weight), {"row_scale": scale})


def inplace_cases() -> Iterator[Case]:
    for case in merge_cases():
        if case.name != "expanded":
            yield case
    yield Case("base", (weights(20, 30, dtype=BF16), *factors(20, 30, [4])), {"base": weights(20, 30, seed=9)})
    yield Case("strided base", (weights(20, 60)[:, ::2], *factors(20, 30, [4])), {"base": weights(30, 20, seed=9).t()})


def backward_cases() -> Iterator[Case]:
    for dtype in (F32, BF16, F64):
        gradient, base = weights(29, 131, seed=1, dtype=dtype), weights(29, 131, dtype=dtype)
        right, left = factors(29, 131, [1, 5, 2])
        scale = weights(29, seed=7, dtype=F64 if dtype == F64 else F32)
        yield Case(f"{dtype}", (gradient, base, right, left, weights(3, seed=8), scale, [True] * 4))
        yield Case(f"{dtype}, not scaled", (gradient, None, right, left, weights(3, seed=8)))
    right, left = factors(12, 17, [2, 3])
    for place in range(3):
        needed = [one == place for one in range(4)]
        yield Case(f"only {place}", (weights(12, 17), None, right, left, weights(2), None, needed))
    yield Case("no rows", (weights(0, 6), None, *factors(0, 6, [2]), weights(1)))


def tasks_cases() -> Iterator[Case]:
    for base, factor in ((F32, F32), (BF16, F32), (F16, BF16), (F32, F64)):
        A, B = weights(3, 4, 131, dtype=factor), weights(3, 29, 4, seed=1, dtype=factor)
        yield Case(f"{base}-{factor}", (weights(29, 131, dtype=base), A, B, [0.5, -2.0, 0.1]), {"scale": 0.5})
    yield Case("strided", (weights(30, 20).t(), weights(30, 3, 4).permute(1, 2, 0), weights(20, 4, 6)[..., ::2].permute(2, 0, 1)))
    yield Case("no tasks", (weights(5, 6), weights(0, 2, 6), weights(0, 5, 2)))
    leaves = [one.requires_grad_() for one in (weights(5, 6), weights(2, 3, 6), weights(2, 5, 3, seed=1), weights(2, seed=2))]
    yield Case("gradient", tuple(leaves))


def norm_cases() -> Iterator[Case]:
    for case in merge_cases():
        yield Case(case.name, case.args, {name: value for name, value in case.kwargs.items() if name != "row_scale"})


CONTRACTS = (
    Contract("lowrank_merge", taskloom.lowrank_merge, differentiable_cases),
    Contract("lowrank_merge_", taskloom.lowrank_merge_, inplace_cases, mutates=(0,)),
    Contract("lowrank_merge_backward", lowrank_merge_backward, backward_cases, torch_products=True),
    Contract("lowrank_merge_tasks", taskloom.lowrank_merge_tasks, tasks_cases),
    Contract("lowrank_norm", taskloom.lowrank_norm, norm_cases),
)
