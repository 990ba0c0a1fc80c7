"""A linear layer that serves any task of a space, or a batch that mixes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from taskloom.methods.merging.rmm.space import RMMSpace
from taskloom.ops import rmm_linear, rmm_reconstruct

_PARTS = ("mean", "basis", "coefficients")


class RMMLinear(nn.Module):
    """``y = base(x) + x (A_t B_t)^T`` with each row's task t, from the shared bases.

    Parameters
    ----------
    base_linear
        The frozen layer, in and out features as the adapters have them.
    space
        From :func:`fit_rmm`.
    layer
        The layer's name in it.

    Notes
    -----
    A batch of one task reconstructs that task's adapter once (:meth:`set_task`, or an int) and applies it as a LoRA; a batch that mixes
    tasks goes through :func:`taskloom.rmm_linear`, which reads the bases instead of every task's adapter. Gradients flow to x only.
    """

    def __init__(self, base_linear: nn.Linear, space: RMMSpace, layer: str) -> None:
        super().__init__()
        if not isinstance(base_linear, nn.Linear):
            raise TypeError(f"base_linear: expected nn.Linear, got {type(base_linear).__name__}")
        if layer not in space.layers:
            raise KeyError(f"layer: {layer!r} is unknown, the layers are {', '.join(space.layers)}")
        found = space.layers[layer]
        sizes = (found.b.mean.shape[0], found.a.mean.shape[0])
        if sizes != (base_linear.in_features, base_linear.out_features):
            raise ValueError(
                f"base_linear: expected {sizes[0]} in and {sizes[1]} out features as layer {layer!r}, got {base_linear.in_features} "
                f"and {base_linear.out_features}"
            )
        self.base = base_linear
        self.tasks = list(space.tasks)
        self.layer = layer
        for factor, positions in (("a", found.a), ("b", found.b)):
            for part in _PARTS:
                self.register_buffer(f"{factor}_{part}", getattr(positions, part))
        self._cached: tuple[int, Tensor, Tensor] | None = None
        self._task: int | None = None

    def set_task(self, task: str | None) -> None:
        """Serve one task where ``forward`` is given none; its adapter is reconstructed once. None forgets it."""
        if task is not None and task not in self.tasks:
            raise KeyError(f"task: {task!r} is unknown, the tasks are {', '.join(self.tasks)}")
        self._task = None if task is None else self.tasks.index(task)
        self._cached = None

    def _parts(self, factor: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, basis and coefficients of the positions of one factor."""
        mean, basis, coefficients = (self.get_buffer(f"{factor}_{part}") for part in _PARTS)
        return mean, basis, coefficients

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cached = None
        layer: Any = super()
        module: Self = layer._apply(fn, recurse)
        return module

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*arguments, **named)

    def _factors(self, task: int) -> tuple[Tensor, Tensor]:
        if self._cached is None or self._cached[0] != task:
            # What inference mode makes could not be used for a backward later.
            with torch.inference_mode(False), torch.no_grad():
                a, b = (
                    rmm_reconstruct(mean, basis, coefficients[task].contiguous())
                    for mean, basis, coefficients in (self._parts("a"), self._parts("b"))
                )
            self._cached = task, a, b
        return self._cached[1], self._cached[2]

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        x
            [..., in_features].
        task
            A task's place, or int64 of x's leading shape (or [N] for x [N, ..., in]): each sample's. Default: that of :meth:`set_task`.

        Raises
        ------
        TypeError
            If a task is no integer.
        ValueError
            If there is no task, or its shape does not fit.
        IndexError
            If a task's place is not below the number of tasks.
        """
        chosen = self._task if task is None else task
        if chosen is None:
            raise ValueError("task: expected a task's place or a tensor of them; none was given and set_task was not called")
        y: Tensor = self.base(x)
        if not isinstance(chosen, Tensor):
            if isinstance(chosen, bool) or not isinstance(chosen, int):
                raise TypeError(f"task: expected a task's place or a tensor of them, got {type(chosen).__name__}")
            if not 0 <= chosen < len(self.tasks):
                raise IndexError(f"task: expected a place below {len(self.tasks)}, got {chosen}")
            a, b = self._factors(chosen)
            return y + (x @ b.to(x.dtype)) @ a.to(x.dtype).T
        rows = x.reshape(-1, x.shape[-1])
        places = self._places(chosen, x.shape[:-1])
        added = rmm_linear(rows, places, *self._parts("a"), *self._parts("b"))
        # Under autocast the base's output is narrower than x.
        return y + added.view(y.shape).to(y.dtype)

    def _places(self, task: Tensor, shape: torch.Size) -> Tensor:
        if task.shape == shape:
            return task.reshape(-1)
        if task.dim() == 1 and len(shape) > 1 and task.shape[0] == shape[0]:
            return task.repeat_interleave(shape[1:].numel())
        raise ValueError(f"task: expected shape {tuple(shape)} or {tuple(shape[:1])}, got {tuple(task.shape)}")
