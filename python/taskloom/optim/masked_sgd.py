"""SGD of active entries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taskloom.ops import masked_sgd_
from taskloom.optim.masked_optimizer import ACTIVE, MaskedOptimizer, Masks, check_not_negative


class MaskedSGD(MaskedOptimizer):
    """SGD that steps the active entries of parameters only, and stores their momentum only.

    Parameters
    ----------
    params, masks, foreach
        As for :class:`MaskedAdamW`.
    lr, momentum, dampening, weight_decay, nesterov, maximize
        As for :class:`torch.optim.SGD`; ``lr`` may be a tensor of one element. Entries that are not active do not decay.

    Raises
    ------
    TypeError, ValueError
        As :class:`MaskedAdamW`; ValueError also for Nesterov momentum without momentum or with dampening.

    Notes
    -----
    State per parameter: ``step``, ``active`` (the mask) and, with momentum, ``momentum_buffer``, a vector with one float32 element (float64
    where the parameter is) for each active entry. The rule is that of :class:`torch.optim.SGD`.
    """

    def __init__(
        self,
        params: Any,
        masks: Masks = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, masks, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            check_not_negative(name, group[name])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov: expected momentum and no dampening with it, got momentum {group['momentum']}, dampening {group['dampening']}"
            )

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _run(self, group: dict[str, Any], params: list[Tensor], steps: list[float]) -> None:
        grads, buffer, active = self._lists(params, "momentum_buffer", ACTIVE)
        options = {name: group[name] for name in ("momentum", "dampening", "weight_decay", "nesterov", "maximize")}
        given = buffer if group["momentum"] != 0 else None
        masked_sgd_(params, grads, given, active, steps, lr=float(group["lr"]), **options)
