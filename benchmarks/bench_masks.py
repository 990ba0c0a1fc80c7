"""Speed of the ops on packed masks and task vectors against plain torch: ``pytest benchmarks/bench_masks.py --benchmark-json=FILE``.

Each row checks its op against the reference first, then times op and peers in turn, so that a busy machine slows all of them alike.
``extra_info`` says how many bytes the op must move, how that compares with a large copy timed in the same session, and how often faster
the op is than each peer.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import taskloom
from taskloom.ops import _library
from taskloom.ops.masked import block_scale_merge_backward

NUMEL = 1 << 22
TASKS = 8
ROUNDS = 7

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """An op's call, the same in plain torch, and the bytes that the op must read and write."""

    name: str
    bytes: int
    ours: Call
    peers: dict[str, Call]


def device() -> str:
    """The processor, the threads that torch uses, and the level that the loops run at."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, level {_library.cpu_level()}"


def weights(seed: int, dtype: torch.dtype = torch.float32, numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed_mask(seed: int, density: float) -> torch.Tensor:
    return taskloom.pack_mask(torch.rand(NUMEL, generator=torch.Generator().manual_seed(seed)) < density)


def task_mask_row() -> Row:
    base, tuned, total = weights(0), weights(1), weights(2)

    def eager() -> torch.Tensor:
        delta = tuned - base
        return delta.abs() > 0.4 * (total - delta).abs()

    return Row(
        "task_mask",
        NUMEL * 12 + NUMEL // 8,
        lambda: taskloom.task_mask(base, tuned, total),
        {"eager, a bool mask": eager, "eager, packed": lambda: taskloom.pack_mask(eager())},
    )


def multi_task_vector_row() -> Row:
    base, tuned = weights(0, torch.bfloat16), [weights(seed, torch.bfloat16) for seed in range(1, TASKS + 1)]
    return Row(
        "multi_task_vector",
        NUMEL * (2 * (TASKS + 1) + 4),
        lambda: taskloom.multi_task_vector(base, tuned),
        {"eager": lambda: sum(one.float() - base.float() for one in tuned)},
    )


def mask_count_row() -> Row:
    tasks = 20
    packed = torch.stack([packed_mask(seed, 0.4) for seed in range(tasks)])
    masks = [taskloom.unpack_mask(one, (NUMEL,)) for one in packed]

    def eager(masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.zeros(NUMEL, dtype=torch.uint8)
        for mask in masks:
            counts += mask
        return counts >= 2, torch.bincount(counts, minlength=tasks + 1)

    return Row(
        "mask_count",
        (tasks + 1) * NUMEL // 8,
        lambda: taskloom.mask_count(packed, NUMEL, 2),
        {
            "eager on bool masks": lambda: eager(masks),
            "unpack and eager": lambda: eager([taskloom.unpack_mask(one, (NUMEL,)) for one in packed]),
        },
    )


def masked_compress_row(density: float) -> Row:
    values, packed = weights(0), packed_mask(1, density)
    mask = taskloom.unpack_mask(packed, (NUMEL,))
    return Row(
        f"masked_compress, {density:.0%} set",
        int(NUMEL * (4 + 4 * density + 1 / 8)),
        lambda: taskloom.masked_compress(values, packed),
        {
            "masked_select on a bool mask": lambda: torch.masked_select(values, mask),
            "unpack and masked_select": lambda: torch.masked_select(values, taskloom.unpack_mask(packed, (NUMEL,))),
        },
    )


def masked_restore_row(density: float) -> Row:
    base, packed = weights(0), packed_mask(1, density)
    mask = taskloom.unpack_mask(packed, (NUMEL,))
    compressed = taskloom.masked_compress(weights(2), packed)
    return Row(
        f"masked_restore, {density:.0%} set",
        int(NUMEL * (8 + 4 * density + 1 / 8)),
        lambda: taskloom.masked_restore(compressed, packed, base),
        {"masked_scatter on a bool mask": lambda: base.masked_scatter(mask, compressed)},
    )


def masked_update_row(density: float) -> Row:
    base, total, packed = weights(0), weights(1, torch.float16), packed_mask(1, density)
    mask = taskloom.unpack_mask(packed, (NUMEL,))

    def eager(mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, base + total.float(), base)

    return Row(
        f"masked_update, {density:.0%} set",
        NUMEL * 10 + NUMEL // 8,
        lambda: taskloom.masked_update(base, packed, total),
        {
            "where on a bool mask": lambda: eager(mask),
            "unpack and where": lambda: eager(taskloom.unpack_mask(packed, (NUMEL,))),
        },
    )


def masked_update_inplace_row(density: float) -> Row:
    target, delta, packed = weights(0), weights(1), packed_mask(1, density)
    mask = taskloom.unpack_mask(packed, (NUMEL,))

    def indexed() -> torch.Tensor:
        target[mask] += 1e-3 * delta[mask]
        return target

    return Row(
        f"masked_update_, {density:.0%} set",
        int(NUMEL * (12 * density + 1 / 8)),
        lambda: taskloom.masked_update_(target, packed, delta, 1e-3),
        {
            "where on a bool mask": lambda: target.copy_(torch.where(mask, target + 1e-3 * delta, target)),
            "indexing with a bool mask": indexed,
        },
    )


def masked_switch_row(difference: float) -> Row:
    base, total, old = weights(0), weights(1), packed_mask(1, 0.3)
    new = old ^ packed_mask(2, difference)
    target = taskloom.masked_update(base, old, total)
    mask = taskloom.unpack_mask(new, (NUMEL,))
    return Row(
        f"masked_switch_, {difference:.0%} changed",
        int(NUMEL * (12 * difference + 2 / 8)),
        lambda: taskloom.masked_switch_(target, base, total, old, new),
        {
            "unpack and where": lambda: torch.where(taskloom.unpack_mask(new, (NUMEL,)), base + total, base, out=target),
            "where on a bool mask": lambda: torch.where(mask, base + total, base, out=target),
        },
    )


def _pool(blocks: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    numel = NUMEL // blocks
    base = [weights(block, numel=numel) for block in range(blocks)]
    return base, [[weights(100 * task + block, torch.float16, numel) for block in range(blocks)] for task in range(1, TASKS + 1)]


def block_scale_merge_row() -> Row:
    blocks = 8
    base, deltas = _pool(blocks)
    coef = weights(9, numel=TASKS * blocks).reshape(TASKS, blocks)
    stacked = [torch.stack([task[block] for task in deltas]).float() for block in range(blocks)]

    def loop() -> list[torch.Tensor]:
        return [one + sum(coef[t, b] * task[b].float() for t, task in enumerate(deltas)) for b, one in enumerate(base)]

    return Row(
        "block_scale_merge",
        NUMEL * (8 + 2 * TASKS),
        lambda: taskloom.block_scale_merge(base, deltas, coef),
        {
            "eager loop": loop,
            "einsum on stacked float32": lambda: [one + torch.einsum("t,tn->n", coef[:, b], stacked[b]) for b, one in enumerate(base)],
        },
    )


def block_scale_merge_groups_row() -> Row:
    groups = 10
    base, deltas = weights(0), [weights(seed, torch.float16) for seed in range(1, TASKS + 1)]
    coef = weights(9, numel=TASKS * groups).reshape(TASKS, 1, groups)
    partition = torch.randint(0, groups, (NUMEL,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    index = partition.int()
    return Row(
        f"block_scale_merge, {groups} groups",
        NUMEL * (9 + 2 * TASKS),
        lambda: taskloom.block_scale_merge(base, deltas, coef, partition),
        {"eager loop, indexed": lambda: base + sum(coef[t, 0][index] * one.float() for t, one in enumerate(deltas))},
    )


def block_scale_merge_backward_row() -> Row:
    blocks = 8
    gradients, deltas = _pool(blocks)
    stacked = [torch.stack([task[block] for task in deltas]).float() for block in range(blocks)]
    return Row(
        "block_scale_merge_backward",
        NUMEL * (4 + 2 * TASKS),
        lambda: block_scale_merge_backward(gradients, deltas),
        {
            "eager loop": lambda: [[torch.dot(one, task[b].float()) for b, one in enumerate(gradients)] for task in deltas],
            "einsum on stacked float32": lambda: [torch.einsum("tn,n->t", stacked[b], one) for b, one in enumerate(gradients)],
        },
    )


ROWS: tuple[tuple[Callable[..., Row], tuple[float, ...]], ...] = (
    (task_mask_row, ()),
    (multi_task_vector_row, ()),
    (mask_count_row, ()),
    (masked_compress_row, (0.1,)),
    (masked_compress_row, (0.5,)),
    (masked_restore_row, (0.1,)),
    (masked_update_row, (0.4,)),
    (masked_update_inplace_row, (0.01,)),
    (masked_update_inplace_row, (0.4,)),
    (masked_switch_row, (0.02,)),
    (masked_switch_row, (0.3,)),
    (block_scale_merge_row, ()),
    (block_scale_merge_groups_row, ()),
    (block_scale_merge_backward_row, ()),
)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result.clone()
        return
    for part in result:
        yield from _tensors(part)


def check(row: Row) -> None:
    """Raise unless the op agrees with its reference."""
    with taskloom.backend("reference"):
        expected = list(_tensors(row.ours()))
    with taskloom.backend("native"):
        got = list(_tensors(row.ours()))
    for ours, theirs in zip(got, expected, strict=True):
        # An in-place op was applied twice to one target; its second result lies as near to the first as the step is small.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-2 if row.name.startswith("masked_update_,") else 1e-5)


def seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@pytest.fixture(scope="module")
def copy_rate() -> float:
    """Bytes that a large copy reads and writes in a second."""
    source, target = torch.empty(1 << 25).fill_(1), torch.empty(1 << 25)
    return 2 * source.numel() * 4 / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(5))


@pytest.mark.parametrize(
    ("make", "arguments"), [pytest.param(make, arguments, id=f"{make.__name__}{arguments}") for make, arguments in ROWS]
)
def test_speed(make: Callable[..., Row], arguments: tuple[float, ...], benchmark: Any, copy_rate: float) -> None:
    row = make(*arguments)
    check(row)
    times: dict[str, list[float]] = {name: [] for name in ("ours", *row.peers)}
    for _ in range(ROUNDS):
        for name, call in (("ours", row.ours), *row.peers.items()):
            times[name].append(seconds(call))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    benchmark.group = "masks"
    benchmark.extra_info.update(
        row=row.name,
        device=device(),
        torch=torch.__version__,
        bytes=row.bytes,
        share_of_copy_rate=row.bytes / medians["ours"] / copy_rate,
        ratio={name: medians[name] / medians["ours"] for name in row.peers},
    )
    benchmark.pedantic(row.ours, rounds=ROUNDS, warmup_rounds=1)
