"""Many gates over one pool of experts, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def everywhere(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, or one of all experts, ``[G, E]``."""
    return torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device) if mask is None else mask


def _softmax(logits: Tensor, mask: Tensor) -> Tensor:
    # What is masked is set to 0 after it too: a row of NaN would make NaN of it.
    return torch.where(mask, torch.softmax(torch.where(mask, logits, -torch.inf), -1), 0)


def _sigmoid(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, torch.sigmoid(torch.where(mask, logits, 0)), 0)


def _gates(logits: Tensor, mask: Tensor, activation: str) -> Tensor:
    return _softmax(logits, mask) if activation == "softmax" else _sigmoid(logits, mask)


def _self_gates(logits: Tensor, mask: Tensor) -> Tensor:
    """A softmax over a gate's own experts, or the sigmoid of its only one."""
    single = mask.sum(1, keepdim=True) == 1
    # The softmax of a single one, which need not be finite, would make NaN of its gradient.
    return torch.where(single, _sigmoid(logits, mask), _softmax(torch.where(single, 0, logits), mask))


def _slopes(probs: Tensor, slopes: Tensor, softmax: Tensor) -> Tensor:
    """What gradients of weights are as those of logits; ``softmax`` [G, 1] tells the gates of which kind."""
    inner = (probs * slopes).sum(-1, keepdim=True)
    return torch.where(softmax, probs * (slopes - inner), probs * (1 - probs) * slopes)


def multi_gate_combine(
    logits: Tensor, z: Tensor, mask: Tensor | None, activation: str, self_logits: Tensor | None, self_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The experts z [B, E, D] added up by the weights of each gate, [B, G, D]; and the weights, without those of the self gate."""
    dtype = accumulation_dtype(logits, z, self_logits)
    allowed = everywhere(logits, mask)
    probs = weights = _gates(logits.to(dtype), allowed, activation)
    if self_logits is not None and self_mask is not None:
        weights = probs + _self_gates(self_logits.to(dtype), self_mask)
        allowed = allowed | self_mask
    out = torch.zeros((*logits.shape[:2], z.shape[2]), dtype=dtype, device=z.device)
    for e in range(z.shape[1]):
        # What a gate may not read is replaced before it is multiplied: 0 times NaN would be NaN.
        out = out + weights[:, :, e, None] * torch.where(allowed[:, e, None], z[:, e, None].to(dtype), 0)
    return out.to(z.dtype), probs


def multi_gate_combine_backward(
    gradient: Tensor,
    for_probs: Tensor | None,
    logits: Tensor,
    z: Tensor,
    mask: Tensor | None,
    activation: str,
    self_logits: Tensor | None,
    self_mask: Tensor | None,
    for_logits: bool,
    for_z: bool,
    for_self: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of logits, z and self_logits; empty where not wanted."""
    dtype = accumulation_dtype(logits, z, self_logits)
    allowed = everywhere(logits, mask)
    probs = weights = _gates(logits.to(dtype), allowed, activation)
    either, own = allowed, None
    if self_logits is not None and self_mask is not None:
        own = _self_gates(self_logits.to(dtype), self_mask)
        weights, either = probs + own, allowed | self_mask
    wide = gradient.to(dtype)
    dz = torch.stack([torch.where(either[:, e, None], weights[:, :, e, None] * wide, 0).sum(1) for e in range(z.shape[1])], 1)
    products = [(torch.where(either[:, e, None], z[:, e, None].to(dtype), 0) * wide).sum(-1) for e in range(z.shape[1])]
    slopes = torch.where(either, torch.stack(products, -1), 0)
    dlogits, dself = logits.new_empty(0), logits.new_empty(0)
    if for_logits:
        total = slopes if for_probs is None else slopes + for_probs.to(dtype)
        softmax = torch.full((len(allowed), 1), activation == "softmax", device=logits.device)
        dlogits = torch.where(allowed, _slopes(probs, torch.where(allowed, total, 0), softmax), 0).to(logits.dtype)
    if for_self and own is not None and self_logits is not None and self_mask is not None:
        softmax = self_mask.sum(1, keepdim=True) > 1
        dself = torch.where(self_mask, _slopes(own, torch.where(self_mask, slopes, 0), softmax), 0).to(self_logits.dtype)
    return dlogits, dz.to(z.dtype) if for_z else z.new_empty(0), dself
