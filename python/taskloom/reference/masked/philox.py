"""Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, sections 3.3 and 4) in int64 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit products, by halves of the factor so that no product exceeds 48 bits."""
    low, high = (factor & 0xFFFF) * words, (factor >> 16) * words
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_blocks(seed: int, key: int, blocks: Tensor) -> Tensor:
    """Four 32-bit words for each counter ``(block, key)`` under the key ``seed``: int64 of shape ``[len(blocks), 4]``."""
    counter = [blocks & _WORD, (blocks >> 32) & _WORD, torch.full_like(blocks, key & _WORD), torch.full_like(blocks, key >> 32)]
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], counter[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], counter[2])
        counter = [high1 ^ counter[1] ^ key0, low1, high0 ^ counter[3] ^ key1, low0]
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return torch.stack(counter, dim=1)


def philox_words(seed: int, key: int, numel: int, device: torch.device, first: int = 0) -> Tensor:
    """The random words of the elements ``first .. first + numel``: word ``i % 4`` of block ``i // 4``; int64 in [0, 2**32)."""
    blocks = torch.arange(first // 4, (first + numel + 3) // 4, dtype=torch.int64, device=device)
    return philox_blocks(seed, key, blocks).reshape(-1)[first % 4 :][:numel]
