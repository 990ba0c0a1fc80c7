"""Weight decay that acts on the whole weights where an optimizer holds their differences from a base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Bases = Callable[[], Mapping[nn.Parameter, Tensor]]

_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor)
_COUPLED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
)


def _is_decoupled(optimizer: Optimizer, decoupled: bool | None) -> bool:
    if decoupled is not None:
        return decoupled
    if isinstance(optimizer, _DECOUPLED):
        return True
    if not isinstance(optimizer, _COUPLED):
        raise TypeError(
            f"decay_whole_weights: optimizer: {type(optimizer).__name__} is not known here; say decoupled=True if it shrinks the "
            "weights beside the gradient step as AdamW does, False if it adds the decay to the gradient as SGD does"
        )
    settings = {bool(group.get("decoupled_weight_decay", False)) for group in optimizer.param_groups}
    if len(settings) > 1:
        raise ValueError("decay_whole_weights: optimizer: expected one decoupled_weight_decay for all groups")
    return settings.pop()


def _decayed(optimizer: Optimizer, bases: Mapping[nn.Parameter, Tensor]) -> Iterator[tuple[Mapping[str, Any], nn.Parameter, Tensor]]:
    """What this step of the optimizer decays, and the base of each."""
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError("decay_whole_weights: a fused optimizer under a GradScaler may leave steps out unseen; use fused=False")
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0) != 0:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in bases:
                    yield group, parameter, bases[parameter]


def decay_whole_weights(optimizer: Optimizer, bases: Bases, decoupled: bool | None) -> RemovableHandle:
    """Register the hook that adds the base's share of the decay to every step; see ``LinearizedModel.decay_whole_weights``."""
    known = bases()
    if not any(parameter in known for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("decay_whole_weights: optimizer: expected one over parameters of this model, got one that has none of them")

    @torch.no_grad()
    def shrink(stepped: Optimizer, args: object, kwargs: object) -> None:
        for group, tau, base in _decayed(stepped, bases()):
            tau.sub_(group["lr"] * group["weight_decay"] * base.to(tau.dtype))

    @torch.no_grad()
    def pull(stepped: Optimizer, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        # The arguments begin with the optimizer.
        if kwargs.get("closure") is not None or any(argument is not None for argument in args[1:]):
            raise RuntimeError(
                "decay_whole_weights: a closure computes the gradients after the base's decay was added to them; call step() without one"
            )
        for group, tau, base in _decayed(stepped, bases()):
            sign = -1 if group.get("maximize", False) else 1
            assert tau.grad is not None
            tau.grad.add_(base.to(tau.grad.dtype), alpha=sign * float(group["weight_decay"]))

    if _is_decoupled(optimizer, decoupled):
        return optimizer.register_step_post_hook(shrink)
    return optimizer.register_step_pre_hook(pull)
