"""aTLAS over LoRA adapters: coefficients inside the rank space of each adapted layer, whose dense change is never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from taskloom.methods.merging.atlas.blocks import by_id, meant_modules, shown
from taskloom.methods.merging.atlas.coefficients import Coefficients, Granularity, check_granularity
from taskloom.methods.merging.atlas.lowrank import Factors, LowRankTaskVector
from taskloom.nn.base_layers import check_base_layer
from taskloom.nn.change_class import change_class, restore_class
from taskloom.ops import lowrank_apply, lowrank_merge, lowrank_merge_


class _Adapted:
    """The vectors' factors of one layer, stacked once, and where its coefficients are."""

    def __init__(self, owner: LowRankAtlasModel, place: int, factors: Sequence[Factors], device: torch.device) -> None:
        self.owner, self.place = owner, place
        dtype = reduce(torch.promote_types, (part.dtype for right, left, _ in factors for part in (right, left)))
        rank = max(right.shape[0] for right, _, _ in factors)
        # Ranks are filled up with zeros, which add nothing.
        self.A = torch.stack([pad(right.to(device, dtype), (0, 0, 0, rank - len(right))) for right, _, _ in factors])
        self.B = torch.stack([pad(left.to(device, dtype), (0, rank - left.shape[1])) for _, left, _ in factors])
        self.scale = torch.tensor([scale for _, _, scale in factors], dtype=torch.float64, device=device)

    def weights(self) -> Tensor:
        """Each vector's factor of the product: its coefficient times its scale."""
        coef = self.owner.coef if self.owner.granularity == "vector" else self.owner.coef[:, self.place]
        return coef * self.scale.to(coef.dtype)

    def to(self, device: torch.device) -> None:
        """Move the factors."""
        self.A, self.B, self.scale = self.A.to(device), self.B.to(device), self.scale.to(device)


def _members(base: Any) -> dict[str, Any]:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        adapted = cast(_Adapted, self.atlas)
        return lowrank_apply(x, adapted.A, adapted.B, adapted.weights(), base=self.weight, bias=self.bias)

    return {"forward": forward}


def _named(task_vectors: Sequence[LowRankTaskVector] | Mapping[str, LowRankTaskVector]) -> dict[str, LowRankTaskVector]:
    named = by_id(task_vectors)
    for key, vector in named.items():
        if not isinstance(vector, LowRankTaskVector):
            raise TypeError(f"task_vectors: {key}: expected a LowRankTaskVector, got {type(vector).__name__}; AtlasModel takes dense ones")
    return named


def _layers(model: nn.Module, named: Mapping[str, LowRankTaskVector], target_modules: str | Sequence[str] | None) -> dict[str, nn.Linear]:
    """The layers that have blocks, by their weight's name, in the model's order; checked against every vector."""
    (first, vector), *_ = named.items()
    for key, other in named.items():
        if set(other) != set(vector):
            raise ValueError(
                f"task_vectors: {key}: expected the weights of {first}; they differ by {shown(sorted(set(other) ^ set(vector)))}"
            )
    modules = dict(model.named_modules())
    known = {f"{path}.weight" if path else "weight" for path in modules}
    unknown = sorted(set(vector) - known)
    if unknown:
        raise ValueError(
            f"task_vectors: {first}: {shown(unknown)} {'is' if len(unknown) == 1 else 'are'} no weight of {type(model).__name__}"
        )
    meant = set() if target_modules is None else meant_modules(model, target_modules)
    found: dict[str, nn.Linear] = {}
    for path, module in modules.items():
        name = f"{path}.weight" if path else "weight"
        if name not in vector or (target_modules is not None and path not in meant):
            continue
        if hasattr(module, "atlas"):
            raise ValueError(f"model: {path!r} belongs to another LowRankAtlasModel; unload() takes it out")
        check_base_layer(f"model: {path}", module)
        assert isinstance(module, nn.Linear)
        for key, one in named.items():
            right, left, _ = one[name]
            got = left.shape[0], right.shape[1]
            if got != module.weight.shape:
                raise ValueError(f"task_vectors: {key}: {name!r}: expected a change of shape {tuple(module.weight.shape)}, got {got}")
        found[name] = module
    if not found:
        raise ValueError(f"target_modules: {target_modules!r} means none of the layers that the task vectors adapt")
    return found


def _norms(factors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(factors, dim=(1, 2), dtype=torch.float64)
    return norms


def _tied(model: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """The names of the layers' weights that are parameters of other modules as well."""
    places: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():
        for name, one in module.named_parameters(prefix=path, recurse=False):
            places.setdefault(one, []).append(name)
    return sorted(
        {name for layer in layers for name in places[layer.get_parameter("weight")] if len(places[layer.get_parameter("weight")]) > 1}
    )


class LowRankAtlasModel(Coefficients):
    """aTLAS over LoRA adapters: a layer's weight is ``W + sum_t coef[t, b] * s_t * B_t A_t``, of which only ``coef`` is trained.

    The adapted layers compute ``x W^T + ((x A^T) * repeat(coef * s, r)) B^T``; their dense change is never formed, forward or backward, and
    the vectors take the memory of their factors.

    Parameters
    ----------
    model
        The base. It is held, not copied, and its parameters stop requiring grad. Its adapted ``nn.Linear`` layers get another forward pass,
        as those of a PEFT model do; :meth:`unload` and :meth:`merge_` give it back.
    task_vectors
        n of them, of the same weights; ranks may differ. In a sequence or by id.
    granularity
        ``"block"`` (default): a coefficient for each vector and weight. ``"vector"``: one for each vector.
    target_modules
        Which of the adapted layers have blocks: names, a pattern for the whole path, or ``"all-linear"``, as in PEFT. Default None: all.

    Attributes
    ----------
    coef
        The coefficients, 0 at first: float32 ``[n, m]`` or ``[n]``; float64 where a weight or a factor is.
    block_names
        The adapted weights, in the model's order.

    Raises
    ------
    TypeError
        If a vector is no :class:`LowRankTaskVector`, or a layer no plain ``nn.Linear``.
    ValueError
        If there is no vector, vectors adapt different weights, a weight is none of the model's or of another shape.

    Notes
    -----
    Source: aTLAS, arXiv 2407.02880, on LoRAs as task vectors. Computed by :func:`taskloom.lowrank_apply`. Groups of entries (aTLAS x K) do
    not exist in the rank space: use :class:`AtlasModel` on :meth:`LowRankTaskVector.dense` vectors for these.
    """

    def __init__(
        self,
        model: nn.Module,
        task_vectors: Sequence[LowRankTaskVector] | Mapping[str, LowRankTaskVector],
        *,
        granularity: Granularity = "block",
        target_modules: str | Sequence[str] | None = None,
    ) -> None:
        check_granularity(granularity)
        named = _named(task_vectors)
        layers = _layers(model, named, target_modules)
        parts = [part for vector in named.values() for name in layers for part in vector[name][:2]]
        double = any(one.dtype == torch.float64 for one in (*parts, *(layer.weight for layer in layers.values())))
        device = next(iter(layers.values())).weight.device
        like = torch.empty(0, dtype=torch.float64 if double else torch.float32, device=device)
        super().__init__(model, tuple(named), tuple(layers), granularity, 1, like)
        self.target_modules = target_modules
        for place, (name, layer) in enumerate(layers.items()):
            adapted: Any = layer
            adapted.atlas = _Adapted(self, place, [vector[name] for vector in named.values()], layer.weight.device)
            change_class(layer, _members)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass; arguments and result are the model's."""
        return self.model(*args, **kwargs)

    @contextmanager
    def compose(self, *, accumulate: bool = False) -> Iterator[Self]:
        """Nothing: each forward pass has its own part of the graph; it is there for :meth:`AtlasModel.compose`, with its argument."""
        yield self

    def materialize(self) -> dict[str, Tensor]:
        """The state dict of the model with the composed weights; what is no block shares memory with the base's."""
        state = cast(dict[str, Tensor], dict(self.model.state_dict()))
        paths: dict[nn.Module, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(f"{path}.weight" if path else "weight")
        with torch.no_grad():
            for name, adapted in self._adapted():
                merged = lowrank_merge(state[name], list(adapted.A), list(adapted.B), adapted.weights())
                state |= dict.fromkeys(paths[self.model.get_submodule(name.rpartition(".")[0])], merged)
        return state

    def merge_(self) -> nn.Module:
        """Write the composed weights into the base, in place, and return it with its layers as they were; the adapter then only calls it.

        Raises
        ------
        RuntimeError
            If the adapter was merged or unloaded before, or a block's weight is another module's too, such as an embedding's or another
            block's.
        ValueError
            If a coefficient is not finite.
        """
        self._check_mergeable()
        tied = _tied(self.model, self._layers())
        if tied:
            raise RuntimeError(f"LowRankAtlasModel.merge_: {shown(tied)} are one weight, which would change for all; use materialize()")
        with torch.no_grad():
            for name, adapted in self._adapted():
                lowrank_merge_(self.model.get_parameter(name), list(adapted.A), list(adapted.B), adapted.weights())
        return self.unload()

    def unload(self) -> nn.Module:
        """Give the base its layers back and return it; the adapter then only calls it.

        Raises
        ------
        RuntimeError
            If the adapter was merged or unloaded before.
        """
        self._check_not_merged("unload")
        for layer in self._layers():
            restore_class(layer, _members)
            del layer.atlas
        self._begin_merge()
        return self.model

    def fingerprints(self) -> list[float]:
        """A number for each vector, from the norms of its factors; RuntimeError where these are gone."""
        self._check_not_merged("fingerprints")
        squares = sum((adapted.scale * _norms(adapted.A) * _norms(adapted.B)).square() for _, adapted in self._adapted())
        return cast(Tensor, squares).sqrt().tolist()

    def _layers(self) -> Iterator[nn.Module]:
        return (self.model.get_submodule(name.rpartition(".")[0]) for name in self.block_names)

    def _adapted(self) -> Iterator[tuple[str, _Adapted]]:
        if not self.merged:
            yield from ((name, cast(_Adapted, layer.atlas)) for name, layer in zip(self.block_names, self._layers(), strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for _, adapted in self._adapted():
            adapted.to(self.coef.device)
        return self
