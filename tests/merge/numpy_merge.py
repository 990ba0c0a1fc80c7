"""The stages of a merge in plain numpy, in the executor's arithmetic: float32 (float64 for float64), tasks in order, one rounding each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_TASK_STEP = 0x9E3779B97F4A7C15
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox_4x32_10(seed: int, key: int, count: int, first_block: int = 0) -> Array:
    """Words of elements 0 .. count: word i % 4 of the block with counter (i / 4, key) under the key ``seed``."""
    blocks = np.arange((count + 3) // 4, dtype=np.uint64) + np.uint64(first_block)
    counter = [blocks & _LOW, blocks >> _HALF, np.full_like(blocks, key & 0xFFFFFFFF), np.full_like(blocks, key >> 32)]
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first = np.uint64(0xD2511F53) * counter[0]
        second = np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (second >> _HALF) ^ counter[1] ^ np.uint64(low),
            second & _LOW,
            (first >> _HALF) ^ counter[3] ^ np.uint64(high),
            first & _LOW,
        ]
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(counter, axis=1).reshape(-1)[:count].astype(np.uint32)


def words_of(name_key: int, task: int, seed: int, shape: tuple[int, ...]) -> Array:
    """The random words of one task's tensor."""
    key = (name_key + task * _TASK_STEP) % 2**64
    return philox_4x32_10(seed, key, int(np.prod(shape))).reshape(shape)


def keep_by_word(words: Array, probability: Array | float) -> Array:
    """Entries whose word is below probability * 2**32."""
    return words.astype(np.float64) < np.rint(np.asarray(probability, np.float64) * 2.0**32)


def rank_probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """DELLA's keep probabilities: linear in the ascending rank of a row (of equal entries the earlier ranks higher), in float32."""
    rows = np.abs(delta).reshape(-1, delta.shape[-1])
    descending = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1, kind="stable")
    share = (rows.shape[1] - 1 - descending).astype(np.float32) / np.float32(rows.shape[1] - 1)
    return (np.float32(density - epsilon) + share * np.float32(2 * epsilon)).reshape(delta.shape)


def keep_band(magnitudes: Array, begin: int, end: int) -> Array:
    """Entries of a segment whose descending magnitude rank is in begin .. end; of equal ones the earlier ranks higher."""
    keep = np.zeros(magnitudes.size, bool)
    keep[np.argsort(-magnitudes.ravel(), kind="stable")[begin:end]] = True
    return keep.reshape(magnitudes.shape)


def l1_factor(delta: Array, keep: Array) -> float:
    """What restores the sum of magnitudes."""
    return float(np.abs(delta).sum(dtype=np.float64) / np.abs(delta[keep]).sum(dtype=np.float64))


def parts_of(deltas: Sequence[Array], keeps: Sequence[Array], weights: Sequence[float], factors: Sequence[Array | float]) -> list[Array]:
    """The weighted and rescaled deltas: weight * (factor * selected delta) of each task."""
    kind = deltas[0].dtype.type
    return [
        kind(weight) * (np.asarray(factor, kind) * np.where(keep, delta, kind(0)))
        for delta, keep, weight, factor in zip(deltas, keeps, weights, factors, strict=True)
    ]


def vote_sum(parts: Sequence[Array], by_count: bool = False) -> Array:
    """What a sign election goes by: the sum of the parts, or of their signs."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + (np.sign(part) if by_count else part)
    return total


def combine(parts: Sequence[Array], weights: Sequence[float], elected: Array | None, normalize: bool) -> Array:
    """The merged delta before its scale; ``elected`` is +1 or -1, None without an election."""
    kind = parts[0].dtype.type
    total, divisor = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agrees = np.ones(part.shape, bool) if elected is None else part * elected > 0
        total = total + np.where(agrees, part, kind(0))
        divisor = divisor + np.where(agrees, kind(weight), kind(0))
    return total / np.where(divisor == 0, kind(1), divisor) if normalize else total


def tall_votes(deltas: Sequence[Array], weights: Sequence[float], merged: Array, thresholds: Sequence[float]) -> Array:
    """How many tasks' TALL masks hold each entry: |own| > threshold * |merged - own|."""
    kind = merged.dtype.type
    votes = np.zeros(merged.shape, np.int64)
    for delta, weight, threshold in zip(deltas, weights, thresholds, strict=True):
        own = kind(weight) * delta
        votes += np.abs(own) > kind(threshold) * np.abs(merged - own)
    return votes
