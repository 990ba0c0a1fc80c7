"""What one call of lora_feature_gate and of batch_norm_silu costs on tensors of a few entries, beside the same in torch eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import taskloom
from taskloom.ops.gating import batch_norm_silu_backward, lora_feature_gate_backward

# The feature gate goes through a dozen ops of torch's, as its eager form does.
LIMIT = 3.0

Call = Callable[[], Any]


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    """Op, ours, peer, the peer's name and the native op alone."""
    ops = torch.ops.taskloom
    x, down, up, weight = given = torch.randn(4, 8), torch.randn(2, 8, 2), torch.randn(2, 2, 8), torch.rand(4, 2)
    z, factors, addends = torch.randn(4, 2, 4), torch.randn(2, 4), torch.randn(2, 4)
    inner = ops.lora_feature_gate.default(*given)[1]
    _, mean, var = ops.batch_norm_silu.default(z, factors, addends, None, None, 1e-5, "silu")
    flat = [one.flatten() for one in (factors, addends)]

    def gate(*given: torch.Tensor) -> torch.Tensor:
        x, down, up, weight = given
        maps = 2 * torch.sigmoid(torch.einsum("blr,lrd->bld", torch.einsum("bd,ldr->blr", x, down), up))
        return x * torch.einsum("bl,bld->bd", weight, maps)

    leaves = [one.clone().requires_grad_() for one in given]
    norm_leaves = [one.clone().requires_grad_() for one in (z.flatten(1), *flat)]
    gated = gate(*leaves)
    normal = F.silu(F.batch_norm(norm_leaves[0], None, None, *norm_leaves[1:], True))
    slopes, whole = z.flatten(1), (None, None, 1e-5, "silu")
    return [
        (
            "lora_feature_gate",
            lambda: taskloom.lora_feature_gate(*given),
            lambda: gate(x, down, up, weight),
            "the formula",
            lambda: ops.lora_feature_gate.default(*given)[0],
        ),
        (
            "lora_feature_gate_backward",
            lambda: lora_feature_gate_backward(x, *given, inner),
            lambda: torch.autograd.grad(gated, leaves, x, retain_graph=True),
            "backward of the formula",
            lambda: ops.lora_feature_gate_backward.default(x, *given, inner, True, True, True, True),
        ),
        (
            "batch_norm_silu",
            lambda: taskloom.batch_norm_silu(z, factors, addends, training=True),
            lambda: F.silu(F.batch_norm(slopes, None, None, *flat, True)),
            "batch_norm, silu",
            lambda: ops.batch_norm_silu.default(z, factors, addends, *whole)[0],
        ),
        (
            "batch_norm_silu_backward",
            lambda: batch_norm_silu_backward(z, z, factors, addends, mean, var),
            lambda: torch.autograd.grad(normal, norm_leaves, slopes, retain_graph=True),
            "backward of batch_norm, silu",
            lambda: ops.batch_norm_silu_backward.default(z, z, factors, addends, mean, var, False, 1e-5, "silu", True, True, True),
        ),
    ]
