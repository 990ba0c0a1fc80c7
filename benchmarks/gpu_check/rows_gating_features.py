"""Rows of lora_feature_gate and batch_norm_silu: a training batch of twelve experts of 256 features, and one of a feature gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from contest import Contest, Row
from inputs_on import normal, total_bytes
from torch import Tensor

import taskloom

EXPERTS, FEATURES, MAPS, RANK = 12, 256, 2, 64


def gate_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    features = min(512, entries // 8)
    rows, rank = entries // features, min(RANK, features // MAPS)
    x = normal(device, dtype, rows * features, 0).reshape(rows, features)
    down = normal(device, dtype, MAPS * features * rank, 1, features**-0.5).reshape(MAPS, features, rank)
    up = normal(device, dtype, MAPS * rank * features, 2, rank**-0.5).reshape(MAPS, rank, features)
    weight = normal(device, dtype, rows * MAPS, 3).reshape(rows, MAPS).softmax(1)

    def eager(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        maps = 2 * torch.sigmoid(torch.einsum("blr,lrd->bld", torch.einsum("bd,ldr->blr", x, down), up))
        return x * torch.einsum("bl,bld->bd", weight, maps)

    given = (x, down, up, weight)
    return Contest(
        ours=lambda: taskloom.lora_feature_gate(*given),
        bytes=2 * x.nbytes + total_bytes(down, up, weight),
        peers={"all maps": lambda: eager(*given)},
        compiled=(eager, given),
    )


def norm_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    features = min(FEATURES, entries // (8 * EXPERTS))
    rows = entries // (EXPERTS * features)
    z = normal(device, dtype, rows * EXPERTS * features, 0).reshape(rows, EXPERTS, features)
    weight, bias = (normal(device, torch.float32, EXPERTS * features, seed).reshape(EXPERTS, features) for seed in (1, 2))

    def eager(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.batch_norm(z.flatten(1), None, None, weight.flatten(), bias.flatten(), True)).reshape(z.shape)

    given = (z, weight, bias)
    return Contest(
        ours=lambda: taskloom.batch_norm_silu(*given, training=True),
        bytes=2 * z.nbytes + total_bytes(weight, bias),
        peers={"batch_norm, silu": lambda: eager(*given)},
        compiled=(eager, given),
        tolerance=1e-5 if dtype == torch.float32 else None,
    )


ROWS = (
    Row("lora_feature_gate", f"{MAPS} maps", gate_contest, bits=22),
    Row("batch_norm_silu", f"{EXPERTS} experts, training", norm_contest, bits=24),
)
