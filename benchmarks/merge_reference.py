"""The measured merges in plain numpy, entry by entry in float32: what a result has to be before its speed counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from taskloom._selection import name_key

Deltas = list[np.ndarray]


@dataclass(frozen=True)
class Setting:
    """Parameters that all tunings share in a measured recipe."""

    weight: float
    density: float
    gamma: float
    seed: int


def _ranks(delta: np.ndarray) -> np.ndarray:
    """Descending magnitude rank of every entry; of equal magnitudes the lower index comes first."""
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")
    ranks = np.empty(order.size, np.int64)
    ranks[order] = np.arange(order.size)
    return ranks.reshape(delta.shape)


def philox_words(seed: int, key: int, count: int) -> np.ndarray:
    """The first ``count`` random words (Philox 4x32-10, Salmon et al. 2011) of a tensor key under a seed."""
    mask = np.uint64(0xFFFFFFFF)
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    counter = [blocks & mask, blocks >> np.uint64(32), np.full_like(blocks, key & 0xFFFFFFFF), np.full_like(blocks, key >> 32)]
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ np.uint64(low),
            second & mask,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(high),
            first & mask,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(counter, axis=1).ravel()[:count].astype(np.uint32)


def _top(name: str, deltas: Deltas, setting: Setting) -> Deltas:
    keep = max(1, int(setting.density * deltas[0].size))
    return [np.where(_ranks(delta) < keep, delta, np.float32(0)) for delta in deltas]


def _band(name: str, deltas: Deltas, setting: Setting) -> Deltas:
    size = deltas[0].size
    keep = int(setting.density * size)
    removed = min(int(setting.gamma * size), size - keep)
    found = [(_ranks(delta), delta) for delta in deltas]
    return [np.where((ranks >= removed) & (ranks < removed + keep), delta, np.float32(0)) for ranks, delta in found]


def _dropped(name: str, deltas: Deltas, setting: Setting) -> Deltas:
    """Random entries, rescaled to the L1 norm that the delta had."""
    limit = round(setting.density * 2**32)
    kept = []
    for task, delta in enumerate(deltas):
        key = (name_key(name) + task * 0x9E3779B97F4A7C15) & (2**64 - 1)
        survivors = np.where(philox_words(setting.seed, key, delta.size).reshape(delta.shape) < limit, delta, np.float32(0))
        before, after = (float(np.abs(values).sum(dtype=np.float64)) for values in (delta, survivors))
        kept.append(np.float32(before / after if before > 1e-7 and after > 1e-7 else 1) * survivors)
    return kept


def _all(name: str, deltas: Deltas, setting: Setting) -> Deltas:
    return deltas


def _sum(parts: Deltas) -> np.ndarray:
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def _elected_sum(parts: Deltas) -> tuple[np.ndarray, list[np.ndarray]]:
    """The sum of the parts that have the sign of the sum of all, and where each has it."""
    sign = np.where(_sum(parts) >= 0, np.float32(1), np.float32(-1))
    agrees = [part * sign > 0 for part in parts]
    return _sum([np.where(mask, part, np.float32(0)) for mask, part in zip(agrees, parts, strict=True)]), agrees


_SELECT: dict[str, Callable[[str, Deltas, Setting], Deltas]] = {
    "task_arithmetic": _all,
    "ties": _top,
    "dare_ties": _dropped,
    "breadcrumbs": _band,
}


def merge_tensor(method: str, name: str, base: np.ndarray, tuned: Sequence[np.ndarray], setting: Setting) -> np.ndarray:
    """One tensor merged by a method with mergekit's defaults, in float32."""
    weight = np.float32(setting.weight)
    parts = [weight * delta for delta in _SELECT[method](name, [values - base for values in tuned], setting)]
    if method not in ("ties", "dare_ties"):
        return base + _sum(parts)
    merged, agrees = _elected_sum(parts)
    if method == "ties":
        divisor = _sum([np.where(mask, weight, np.float32(0)) for mask in agrees])
        merged = merged / np.where(divisor == 0, np.float32(1), divisor)
    return base + merged
