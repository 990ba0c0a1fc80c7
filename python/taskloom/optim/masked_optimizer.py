"""What the masked optimisers share: masks of parameters, compact state, and its way through checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from taskloom.optim.active import Mask, bool_of, carried, count_of, indices_of, stored_mask

Masks: TypeAlias = Mapping[Tensor, Mask] | Mapping[str, Mask] | Sequence[Mask] | float | None

ACTIVE, STEP = "active", "step"


def check_not_negative(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a hyperparameter is a number, or a tensor of one element, that is not negative."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
    if not value >= 0:
        raise ValueError(f"{name}: expected a number that is not negative, got {float(value)}")


class MaskedOptimizer(Optimizer, ABC):
    """An optimiser whose state exists for active entries only; :class:`MaskedAdamW` and :class:`MaskedSGD` say what a step is.

    The mask of a parameter is kept in its state under ``"active"`` (packed uint8, or int32 or int64 indices where fewer than 1 in 32
    entries are active), so that it is saved and loaded with the moments.
    """

    @abstractmethod
    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the compact state that a step of this group needs."""

    @abstractmethod
    def _run(self, group: dict[str, Any], params: list[Tensor], steps: list[float]) -> None:
        """One step over these parameters of a group, each with the number of its step."""

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError unless a group's hyperparameters are in range."""

    def __init__(self, params: Any, masks: Masks, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)
        self._set_masks(self.param_groups, masks, keep=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; its key ``"masks"`` gives masks in any of the forms above."""
        group = dict(param_group)
        masks = group.pop("masks", None)
        self._check_group({**self.defaults, **group})
        super().add_param_group(group)
        try:
            self._set_masks(self.param_groups[-1:], masks, keep=False)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _set_masks(self, groups: list[dict[str, Any]], masks: Masks, keep: bool) -> None:
        """Store the masks of groups' parameters; all are checked before the first is stored."""
        params = [param for group in groups for param in group["params"]]
        named = {name: param for group in groups for name, param in zip(group.get("param_names", ()), group["params"], strict=False)}
        stored = {param: stored_mask(where, mask, param) for where, param, mask in _assigned(masks, params, named)}
        for param, active in stored.items():
            if active is not None and not (keep and ACTIVE in self.state[param]):
                self.state[param][ACTIVE] = active

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of every parameter with a gradient: one call of the op for a group, or with ``foreach=False`` for each parameter.

        A compiled function may call it: the step then runs as it is, beside the graphs. ``fullgraph=True`` is refused.

        Parameters
        ----------
        closure
            Evaluates the model again and returns the loss.

        Returns
        -------
        The closure's loss; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for batch in _batches(params, group["foreach"]):
                self._step_batch(group, batch)
        return loss

    # What a step does depends on its number, which is state and no constant of a graph.
    @_disable_dynamo
    def _step_batch(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            self._prepare(param, self._state_names(group))
        counts = [self.state[param][STEP] for param in params]
        self._run(group, params, [float(count) + 1 for count in counts])
        for count in counts:
            count += 1

    def _prepare(self, param: Tensor, names: tuple[str, ...]) -> None:
        state = self.state[param]
        if STEP not in state:
            state[STEP] = torch.tensor(0.0)
        missing = [name for name in names if name not in state]
        if missing:
            count = count_of(state.get(ACTIVE), param)
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            for name in missing:
                state[name] = torch.zeros(count, dtype=dtype, device=param.device)

    def _lists(self, params: list[Tensor], *names: str) -> list[list[Any]]:
        """Gradients, then each named state, of parameters."""
        return [[param.grad for param in params], *([self.state[param].get(name) for param in params] for name in names)]

    def _param(self, param: Tensor | str) -> Tensor:
        for group in self.param_groups:
            for place, known in enumerate(group["params"]):
                if known is param or (isinstance(param, str) and group.get("param_names", [None] * (place + 1))[place] == param):
                    found: Tensor = known
                    return found
        raise ValueError(f"param: expected a parameter of this optimiser, got {param!r}" if isinstance(param, str) else _UNKNOWN)

    def get_mask(self, param: Tensor | str) -> Tensor:
        """The active entries of a parameter (or of the one of that name), as a bool tensor of its shape."""
        found = self._param(param)
        return bool_of(self.state[found].get(ACTIVE) if found in self.state else None, found)

    def update_mask(self, param: Tensor | str, mask: Mask, state: Literal["keep", "reset"] = "keep") -> None:
        """Change which entries of a parameter are active.

        Parameters
        ----------
        param
            The parameter, or its name where the optimiser was made from named parameters.
        mask
            In any form that the constructor takes; None makes all entries active.
        state
            ``"keep"``: entries that stay active keep their state, new ones start at zero, and the parameter's step count goes on. Bias
            correction counts the parameter's steps, so the first AdamW step of a new entry may be ``(1 - beta1) / sqrt(1 - beta2)`` times
            the learning rate (3.2 times with the defaults). ``"reset"``: all state is zero and the step count starts anew.

        Raises
        ------
        ValueError, TypeError
            If the parameter is none of this optimiser's, or the mask does not fit. Nothing has changed then.
        """
        if state not in ("keep", "reset"):
            raise ValueError(f'state: expected "keep" or "reset", got {state!r}')
        found = self._param(param)
        active = stored_mask("mask", mask, found)
        own = self.state[found]
        kept: dict[str, Any] = {}
        if state == "keep" and STEP in own:
            old, new = indices_of(own.get(ACTIVE), found), indices_of(active, found)
            kept = {name: value if name == STEP else carried(value, old, new) for name, value in own.items() if name != ACTIVE}
        self.state[found] = kept if active is None else {**kept, ACTIVE: active}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave: hyperparameters, step counts, masks and state.

        Raises
        ------
        ValueError
            If a mask or a state does not fit its parameter. Nothing has changed then.
        """
        seen: dict[Tensor, dict[str, Any]] = {}

        def check(optimizer: Optimizer, found: dict[str, Any]) -> None:
            places = [place for group in found["param_groups"] for place in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for place, param in zip(places, params, strict=False):
                if place in found["state"]:
                    seen[param] = _loaded(place, found["state"][place], param)

        # The last hook sees what the others made of the dict.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts state to the parameter's dtype; masks and moments have dtypes of their own.
        for param, values in seen.items():
            self.state[param] = values


_UNKNOWN = "param: expected a parameter of this optimiser, got another tensor"


def _batches(params: list[Tensor], foreach: bool) -> Iterable[list[Tensor]]:
    if not foreach:
        return [[param] for param in params]
    devices: dict[torch.device, list[Tensor]] = {}
    for param in params:
        devices.setdefault(param.device, []).append(param)
    return devices.values()


def _assigned(masks: Masks, params: list[Tensor], named: dict[str, Tensor]) -> list[tuple[str, Tensor, Mask]]:
    """The parameters that masks speak of: what to call the mask, the parameter, the mask."""
    if masks is None:
        return []
    if isinstance(masks, (int, float)):
        return [("masks", param, masks) for param in params]
    if isinstance(masks, Mapping):
        known, found = set(params), []
        for key, mask in masks.items():
            param = named.get(key) if isinstance(key, str) else key
            where = f"masks[{key!r}]" if isinstance(key, str) else "masks"
            if param is None or param not in known:
                hint = " (names need an optimiser made from named_parameters())" if isinstance(key, str) and not named else ""
                raise ValueError(f"{where}: is no parameter of this optimiser{hint}")
            found.append((where, param, mask))
        return found
    if not isinstance(masks, (list, tuple)):
        raise TypeError(f"masks: expected a mapping, a sequence, a density or None, got {type(masks).__name__}")
    if len(masks) != len(params):
        raise ValueError(f"masks: expected {len(params)}, one for each parameter, got {len(masks)}")
    return [(f"masks[{place}]", param, mask) for place, (param, mask) in enumerate(zip(params, masks, strict=True))]


def _loaded(place: Any, values: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """One parameter's part of a state dict: checked, copied, and on its device."""
    where = f"state[{place}]"
    loaded = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in values.items()}
    if ACTIVE in loaded:
        loaded[ACTIVE] = stored_mask(f"{where}: active", loaded[ACTIVE], param)
    count = count_of(loaded.get(ACTIVE), param)
    for name, value in loaded.items():
        if name in (ACTIVE, STEP):
            continue
        wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
        if not isinstance(value, Tensor) or value.shape != (count,) or value.dtype != wanted:
            got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where}: {name}: expected {wanted} of shape ({count},), one element for each active entry, got {got}")
        loaded[name] = value.to(param.device)
    if STEP in loaded:
        loaded[STEP] = torch.tensor(float(loaded[STEP]))
    return loaded
