"""AdamW of active entries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taskloom.ops import masked_adamw_
from taskloom.optim.masked_optimizer import ACTIVE, MaskedOptimizer, Masks, check_not_negative


class MaskedAdamW(MaskedOptimizer):
    """AdamW that steps the active entries of parameters only, and stores their moments only.

    Parameters
    ----------
    params
        As for :class:`torch.optim.AdamW`: parameters, named parameters, or groups. A group may have masks of its own under ``"masks"``.
    masks
        Which entries are active: a mapping from parameters, or from names of named parameters; a sequence with one for each parameter in
        order; one density for all. A mask is a bool tensor of the parameter's shape, packed uint8 (:func:`taskloom.pack_mask`), ascending
        int32 or int64 flat indices, a density (the entries of largest magnitude), or None. Entries of parameters without a mask are all
        active.
    lr, betas, eps, weight_decay, maximize
        As for :class:`torch.optim.AdamW`; ``lr`` may be a tensor of one element. Entries that are not active do not decay.
    foreach
        Whether a group is stepped in one call of :func:`taskloom.masked_adamw_` (default), or each parameter in its own.
    amsgrad
        Not offered; True is an error.

    Raises
    ------
    TypeError, ValueError
        If a mask does not fit its parameter or names none, or a hyperparameter is out of range.

    Notes
    -----
    State per parameter: ``step``, ``active`` (the mask), ``exp_avg`` and ``exp_avg_sq``, vectors with one float32 element (float64 where
    the parameter is) for each active entry in order of flat indices, whatever the parameter's dtype. Source: Loshchilov and Hutter, arXiv
    1711.05101; the compact state is this library's.
    """

    def __init__(
        self,
        params: Any,
        masks: Masks = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool = True,
    ) -> None:
        if amsgrad:
            raise ValueError("amsgrad: MaskedAdamW does not offer it, expected False")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach}
        super().__init__(params, masks, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_not_negative(name, group[name])
        for place, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{place}]: expected 0 <= beta < 1, got {beta}")

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def _run(self, group: dict[str, Any], params: list[Tensor], steps: list[float]) -> None:
        grads, first, second, active = self._lists(params, "exp_avg", "exp_avg_sq", ACTIVE)
        options = {name: group[name] for name in ("betas", "eps", "weight_decay", "maximize")}
        masked_adamw_(params, grads, first, second, active, steps, lr=float(group["lr"]), **options)
