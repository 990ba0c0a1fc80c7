"""C3PO: routing weights of correctly answered neighbours take the place of a sample's own when the model is used.

Source: the predecessor of RoMA, C3PO (tianyi-lab/C3PO); its kernel regression variant, which is the one in the public code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taskloom.methods.routing.roma.recorder import check_recorded, first_input
from taskloom.methods.routing.roma.routers import Layers, chosen_routers, gate_options, score_of, selection_bias
from taskloom.methods.routing.roma.tokens import AskedTokens, Token
from taskloom.nn import TopKRouter


def c3po_reweight(r_ref: Tensor, sim: Tensor, experts: Sequence[int] | None = None) -> Tensor:
    """The mean of neighbours' routing weights by similarity, each router's divided by their sum.

    Parameters
    ----------
    r_ref
        Floating ``[..., k, R]``: full routing weights of each sample's k neighbours, such as ``reference.r[ids]``. C3PO takes the 3
        nearest.
    sim
        Floating ``[..., k]``: similarities of at least 0; C3PO's are cosines.
    experts
        The experts of each router, in the order of r, such as ``reference.experts``. Default None: R are those of one router.

    Returns
    -------
    Tensor
        ``[..., R]`` in the wider of the two dtypes: ``sum_j sim_j r_j / sum_j sim_j``, each router's part with the sum 1.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, a similarity is negative, or a sample's similarities or a router's weights have a sum that is not
        above 0.
    """
    for name, table in (("r_ref", r_ref), ("sim", sim)):
        if not table.is_floating_point():
            raise ValueError(f"c3po_reweight: {name}: expected floating numbers, got {table.dtype}")
    if r_ref.dim() < 2 or sim.shape != r_ref.shape[:-1]:
        raise ValueError(f"c3po_reweight: sim: expected shape {tuple(r_ref.shape[:-1])} as r_ref, got {tuple(sim.shape)}")
    sizes = [r_ref.shape[-1]] if experts is None else list(experts)
    if sum(sizes) != r_ref.shape[-1]:
        raise ValueError(f"c3po_reweight: experts: expected a sum of {r_ref.shape[-1]}, the routing weights of a sample, got {sizes}")
    total = sim.sum(-1, keepdim=True)
    if not bool((sim >= 0).all() & (total > 0).all()):
        raise ValueError("c3po_reweight: sim: expected similarities of at least 0, with a sum above 0 for each sample")
    dtype = torch.promote_types(sim.dtype, r_ref.dtype)
    mean = (sim / total).to(dtype).unsqueeze(-2) @ r_ref.to(dtype)
    parts = mean.squeeze(-2).split(sizes, -1)
    sums = [part.sum(-1, keepdim=True) for part in parts]
    if not all(bool((one > 0).all()) for one in sums):
        raise ValueError("c3po_reweight: r_ref: expected weights with a sum above 0 for each router")
    return torch.cat([part / one for part, one in zip(parts, sums, strict=True)], -1)


class RoutingOverride:
    """Gives one token per sequence other routing weights inside a ``with`` block; the model's own top-k chooses among them.

    Parameters
    ----------
    model
        As of :class:`RoutingRecorder`. Of its chosen routers the gates have to be known, or to return logits alone, which the block around
        them then turns into weights, as in transformers 4.
    r
        Floating ``[B, R]``: for each router the probabilities of its experts, one router's after another's.
    layers, token
        As of :class:`RoMAConfig`. Defaults -5 and ``"last"``.
    every_call
        Whether the weights hold in every call of the model inside the block, so that with ``generate`` each new token is routed by them
        too, as in C3PO's code. Default False: in the first call only, which is that of the prompt.

    Raises
    ------
    ValueError
        If the model has no such routers, a gate is not known or scores by a sigmoid, or ``r`` has another shape, a weight that is negative
        or not finite, or a row without weights for a router.

    Attributes
    ----------
    positions
        As of :class:`RoutingRecorder`.

    Notes
    -----
    A router's logits at the token become ``log r`` times the gate's temperature, of which the gate's softmax is r: all that the gate does
    with its probabilities (choice, renormalising, scaling) it does with these.
    """

    def __init__(self, model: nn.Module, r: Tensor, layers: Layers = -5, *, token: Token = "last", every_call: bool = False) -> None:
        check_recorded("RoutingOverride", layers, token, "full")
        self._model, self._token, self._every_call = model, token, every_call
        self._routers = chosen_routers(model, layers)
        experts = [len(router.get_parameter("weight")) for router in self._routers]
        if r.dim() != 2 or r.shape[1] != sum(experts) or not r.is_floating_point():
            raise ValueError(f"RoutingOverride: r: expected floating numbers of shape (B, {sum(experts)}), got {r.dtype} {tuple(r.shape)}")
        if not bool(((r >= 0) & r.isfinite()).all()):
            raise ValueError("RoutingOverride: r: expected weights of at least 0, finite ones")
        if not all(bool((part.sum(1) > 0).all()) for part in r.split(experts, 1)):
            raise ValueError("RoutingOverride: r: expected weights with a sum above 0 for each row and router")
        for router in self._routers:
            if score_of(router) == "sigmoid":
                raise ValueError(f"RoutingOverride: model: {type(router).__name__} scores by a sigmoid, of which C3PO says nothing")
        # Tiny instead of 0, whose logarithm would leave a gate that chooses it nothing but NaN to renormalise.
        self._logits = r.detach().float().clamp_min(torch.finfo(torch.float32).tiny).log().split(experts, 1)
        self.positions: Tensor | None = None
        self._asked: AskedTokens | None = None
        self._calls = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Begin to override.

        Raises
        ------
        RuntimeError
            If it overrides already.
        """
        if self._handles:
            raise RuntimeError("RoutingOverride: it overrides already")
        self._calls = 0
        self._handles = [self._model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for logits, router in zip(self._logits, self._routers, strict=True):
            self._handles.append(router.register_forward_hook(partial(self._override, logits), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._asked = [], None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._asked = None
        if self._calls and not self._every_call:
            return
        asked = AskedTokens(model, args, kwargs, self._token, self.positions)
        if asked.batch != len(self._logits[0]):
            raise ValueError(f"RoutingOverride: r: expected {asked.batch} rows, one for each sequence, got {len(self._logits[0])}")
        # A call that was refused is not the first.
        self._asked, self._calls = asked, self._calls + 1

    def _override(self, logits: Tensor, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._asked is None:
            return None
        hidden = first_input(args, kwargs)
        rows = self._asked.rows(hidden.numel() // hidden.shape[-1], hidden.device)
        options = gate_options(router)
        # The gate divides by its temperature.
        logits = logits.to(hidden.device) * (1.0 if options is None else options.temperature)
        if isinstance(router, TopKRouter):
            own = router.logits(hidden)
            # Logits of fewer bits would round those of r.
            wide = own.to(torch.promote_types(own.dtype, torch.float32))
            return router.gate(_with_rows(wide, rows, logits), statistics=output.counts is not None)
        return _replaced_rows(router, output, logits, rows)


def _with_rows(tensor: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of ``[..., n]`` with other values in some of its rows."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat.index_copy(0, rows, values.to(tensor.dtype)).reshape(tensor.shape)


def _replaced_rows(router: nn.Module, output: Any, logits: Tensor, rows: Tensor) -> Any:
    """A router's output as if some rows had other logits.

    Raises
    ------
    ValueError
        If it is not known how the router makes its output.
    """
    if isinstance(output, Tensor) and output.shape[-1] == logits.shape[1]:
        return _with_rows(output, rows, logits)
    options = gate_options(router)
    if options is None or not isinstance(output, tuple) or len(output) != 3:
        raise ValueError(f"RoutingOverride: model: {type(router).__name__} is no router whose gate is known")
    gate = options.gate(logits, selection_bias(router))
    own, weight, ids = output
    return (_with_rows(own, rows, logits), _with_rows(weight, rows, gate.weight), _with_rows(ids, rows, gate.ids))
