"""SNELLA's competition between layers: a budget of non-zero entries, which falls over the epochs and goes to where the factors matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.methods.sparsity.snella.model import kernel_layers
from taskloom.ops.lowrank._kernel_arguments import check_sparsity

_FACTORS = ("A", "B")


def budget(t: int, first: int, last: int, total_steps: int, warmup: int = 0, final: int = 0) -> int:
    """Non-zero entries of all layers together at step t.

    Parameters
    ----------
    t
        From 0; an epoch in the paper's code.
    first, last
        Counts at the start and at the end.
    total_steps, warmup, final
        ``first`` holds while t <= warmup, ``last`` for t > total_steps - final; a cubic falls from one to the other between.

    Returns
    -------
    int
        Rounded down, in whole numbers throughout: nothing is lost for any count.
    """
    if t <= warmup:
        return first
    if t > total_steps - final:
        return last
    left, span = total_steps - final - t, total_steps - final - warmup
    return last + (first - last) * left**3 // span**3


def allocate(count: int, scores: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Divide a count among layers in proportion to their scores; what a full layer cannot take goes to the others.

    Parameters
    ----------
    count
        What is to be divided.
    scores
        Finite, not negative. Where those of all layers that are not full are 0, these share equally.
    sizes
        Entries of each layer, which is the most that it can take.

    Returns
    -------
    list of int
        A count per layer. Equal scores give equal counts, so fewer than ``len(sizes)`` may be left over.
    """
    exact = [Fraction(score) for score in scores]
    given = [0] * len(sizes)
    while True:
        open_places = [place for place, size in enumerate(sizes) if given[place] < size]
        left, total = count - sum(given), sum(exact[place] for place in open_places)
        shares = {place: exact[place] / total if total else Fraction(1, len(open_places)) for place in open_places}
        added = {place: min(int(left * share), sizes[place] - given[place]) for place, share in shares.items()}
        if not any(added.values()):
            return given
        for place, more in added.items():
            given[place] += more


def _share(name: str, value: float) -> float:
    try:
        return check_sparsity("SparsityAllocator", value)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("sparsity:", f"{name}:", 1)) from None


class SparsityAllocator:
    """Lets layers with kernel updates compete for non-zero entries, while their number falls.

    Parameters
    ----------
    model
        With layers that :func:`inject_kernel_lora` made; their gate must not be None. All start at ``init``.
    target, init
        Sparsities over all layers at the end and at the start, 0 <= init <= target <= 1.
    total_steps
        Calls of :meth:`step`; epochs in the paper's code.
    warmup, final
        Steps at the start with sparsity ``init`` and no allocation, and at the end with ``target``. Default 0.
    interval
        Between them only every interval-th step allocates. Default 1.
    betas
        How slowly the means of importance and of its spread change. Default (0.85, 0.85).

    Raises
    ------
    TypeError
        If a number of steps is no integer, or a sparsity no number.
    ValueError
        If the model has no such layer, a number is out of range, ``target < init``, or ``total_steps <= warmup + final``.

    Notes
    -----
    Source: SNELLA, arXiv 2510.24037, and its official code. The importance of a factor's entry is ``|w dL/dw|``; a layer's score is the
    mean over A of (mean importance) (mean spread) plus that over B. Entries whose importance is not finite count as 0, as NaN does in the
    official code. Processes that hold the same gradients allocate the same; factors must not be sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        init: float,
        total_steps: int,
        warmup: int = 0,
        final: int = 0,
        interval: int = 1,
        betas: tuple[float, float] = (0.85, 0.85),
    ) -> None:
        self.layers = kernel_layers(model)
        self.target, self.init = _share("target", target), _share("init", init)
        counts = {"total_steps": (total_steps, 1), "warmup": (warmup, 0), "final": (final, 0), "interval": (interval, 1)}
        for name, (value, least) in counts.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"SparsityAllocator: {name}: expected an integer, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"SparsityAllocator: {name}: expected at least {least}, got {value}")
        if self.target < self.init:
            raise ValueError(f"SparsityAllocator: target: expected at least init, {self.init}, got {self.target}")
        if total_steps <= warmup + final:
            raise ValueError(f"SparsityAllocator: total_steps: expected more than warmup + final, {warmup + final}, got {total_steps}")
        if len(betas) != 2 or not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"SparsityAllocator: betas: expected two numbers between 0 and 1, got {betas}")
        for path, layer in self.layers.items():
            if layer.config.gate is None:
                raise ValueError(f"SparsityAllocator: model: {path}: expected a gate, got None, which sparsity has no effect on")
        self.total_steps, self.warmup, self.final, self.interval, self.betas = total_steps, warmup, final, interval, betas
        self.sizes = {path: layer.in_features * layer.out_features for path, layer in self.layers.items()}
        entries = sum(self.sizes.values())
        self.first, self.last = round((1 - self.init) * entries), round((1 - self.target) * entries)
        self.updates = 0
        self._means = {
            f"{path}.{factor}.{mean}": torch.zeros_like(getattr(layer, factor), requires_grad=False)
            for path, layer in self.layers.items()
            for factor in _FACTORS
            for mean in ("importance", "spread")
        }
        for layer in self.layers.values():
            layer.sparsity = self.init

    @torch.no_grad()
    def update_importance(self) -> None:
        """Take note of the gradients; to be called after each optimizer step, before they are set to None or 0.

        Raises
        ------
        RuntimeError
            If a factor has no gradient. Nothing is changed then.
        """
        for path, layer in self.layers.items():
            for factor in _FACTORS:
                if getattr(layer, factor).grad is None:
                    raise RuntimeError(
                        f"SparsityAllocator: {path}.{factor} has no gradient; call update_importance() between backward() and zero_grad()"
                    )
        importance_beta, spread_beta = self.betas
        for path, layer in self.layers.items():
            for factor in _FACTORS:
                weight, importance, spread = getattr(layer, factor), *self._pair(path, factor)
                found = (weight * weight.grad).abs_().nan_to_num_(0.0, 0.0, 0.0)
                importance.lerp_(found, 1 - importance_beta)
                spread.lerp_(found.sub_(importance).abs_(), 1 - spread_beta)
        self.updates += 1

    def _pair(self, path: str, factor: str) -> tuple[Tensor, Tensor]:
        """Means of importance and of its spread, on the factor's device."""
        device = getattr(self.layers[path], factor).device
        names = [f"{path}.{factor}.{mean}" for mean in ("importance", "spread")]
        for name in names:
            self._means[name] = self._means[name].to(device)
        importance, spread = (self._means[name] for name in names)
        return importance, spread

    def scores(self) -> dict[str, float]:
        """Each layer's score; they sum to 1, or are all 0. A layer without entries scores 0.

        Raises
        ------
        RuntimeError
            If :meth:`update_importance` was never called.
        """
        if not self.updates:
            raise RuntimeError("SparsityAllocator: no importance yet; call update_importance() after a backward first")
        found = []
        for path in self.layers:
            means = [importance.double().mul(spread).mean() for importance, spread in (self._pair(path, factor) for factor in _FACTORS)]
            found.append(float(torch.stack(means).sum()) if self.sizes[path] else 0.0)
        total = sum(found)
        return {path: score / total if total else 0.0 for path, score in zip(self.layers, found, strict=True)}

    def budget(self, t: int) -> int:
        """Non-zero entries of all layers together at step t."""
        return budget(t, self.first, self.last, self.total_steps, self.warmup, self.final)

    def step(self, t: int) -> dict[str, float]:
        """Set the layers' sparsities for step t.

        Parameters
        ----------
        t
            From 0, an epoch in the paper's code. While t <= warmup nothing is allocated.

        Returns
        -------
        dict
            Each layer's sparsity, which it keeps until the next allocation.

        Raises
        ------
        TypeError, ValueError
            If t is no integer or below 0.
        RuntimeError
            If an allocation is due and there is no importance yet.
        """
        if isinstance(t, bool) or not isinstance(t, int):
            raise TypeError(f"SparsityAllocator: t: expected an integer, got {type(t).__name__}")
        if t < 0:
            raise ValueError(f"SparsityAllocator: t: expected at least 0, got {t}")
        at_end = t > self.total_steps - self.final
        if at_end or (t > self.warmup and t % self.interval == 0):
            counts = allocate(self.budget(t), list(self.scores().values()), list(self.sizes.values()))
            for layer, count, size in zip(self.layers.values(), counts, self.sizes.values(), strict=True):
                layer.sparsity = 1 - count / size if size else 0.0
        return self.sparsities()

    def sparsities(self) -> dict[str, float]:
        """Each layer's sparsity as it is."""
        return {path: layer.sparsity for path, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on later needs beside the constructor's arguments; tensors are not copied."""
        return {"updates": self.updates, "sparsities": self.sparsities(), "means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, and set the layers' sparsities.

        Raises
        ------
        ValueError
            If it belongs to other layers. Nothing is changed then.
        """
        for key in ("updates", "sparsities", "means"):
            if key not in state:
                raise ValueError(f"SparsityAllocator: state: {key!r} is missing")
        for key, own in (("sparsities", self.layers), ("means", self._means)):
            for name in sorted(state[key].keys() ^ own.keys()):
                raise ValueError(f"SparsityAllocator: state: {key}: {name!r} is {'missing' if name in own else 'not part of this model'}")
        for name, mean in self._means.items():
            if state["means"][name].shape != mean.shape:
                raise ValueError(
                    f"SparsityAllocator: state: {name}: expected shape {tuple(mean.shape)}, got {tuple(state['means'][name].shape)}"
                )
        sparsities = {path: _share(f"state: {path}", value) for path, value in state["sparsities"].items()}
        self.updates = int(state["updates"])
        for name, mean in self._means.items():
            mean.copy_(state["means"][name])
        for path, layer in self.layers.items():
            layer.sparsity = sparsities[path]
