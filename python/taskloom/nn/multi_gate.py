"""Gates over one pool of experts, and the self gate: the projections, beside experts that are the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.ops import multi_gate_combine
from taskloom.ops.gating.multi_gate import ACTIVATIONS


def _checked_mask(name: str, mask: Tensor, gates: int, experts: int) -> Tensor:
    """The mask on the CPU."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"MultiGateMoE: {name}: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != (gates, experts):
        raise ValueError(f"MultiGateMoE: {name}: expected shape ({gates}, {experts}), gates and experts, got {tuple(mask.shape)}")
    if mask.is_meta:
        raise ValueError(f"MultiGateMoE: {name}: expected a mask with values, got one on the meta device")
    mask = mask.detach().cpu()
    empty = torch.nonzero(~mask.any(1))
    if len(empty):
        raise ValueError(f"MultiGateMoE: {name}: expected an expert for every gate, got none for gate {int(empty[0])}")
    return mask


def check_sizes(module: str, **sizes: int) -> None:
    """Refuse sizes below 1 and what is no integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{module}: {name}: expected an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{module}: {name}: expected at least 1, got {size}")


def check_features(module: str, x: Tensor, width: int) -> None:
    """Refuse an input that is not floating, ``[B, width]``."""
    if not x.is_floating_point():
        raise TypeError(f"{module}: x: expected a floating point tensor, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{module}: x: expected shape [B, {width}], got {tuple(x.shape)}")


class MultiGateMoE(nn.Module):
    """Several gates, each with its mask, over one pool of experts; their projections are one matrix product.

    The experts are the caller's: the module has the gates' weights only, one row for each pair of a gate and an expert that it may read.

    Parameters
    ----------
    in_dim
        Features of the gates' input.
    n_experts, n_gates
        Sizes of the pool and of the set of gates.
    mask
        ``[n_gates, n_experts]``, bool: the experts that each gate may read; default None: all. The table of MoE, MMoE, CGC, PLE or HoME.
    act
        ``"softmax"`` (default) or ``"sigmoid"``.
    self_mask
        ``[n_gates, n_experts]``, bool: experts of each gate's self gate, which is added; default None: no self gates.

    Raises
    ------
    TypeError
        If a mask is not bool, or a size no integer.
    ValueError
        If a size is below 1, a mask has another shape, a gate without experts or no values (meta device), or the activation is unknown.

    Attributes
    ----------
    weight
        ``[S, in_dim]``: rows of the pairs that mask holds, gate by gate, then of those that self_mask holds.

    Notes
    -----
    Source: HoME, arXiv 2408.05430. The masks are buffers that move with the model and are not saved. A model that leaves the
    meta device (``to_empty``, or ``load_state_dict`` with ``assign=True``) has them again.
    """

    mask: Tensor | None
    self_mask: Tensor | None
    places: Tensor | None

    def __init__(
        self,
        in_dim: int,
        n_experts: int,
        n_gates: int,
        mask: Tensor | None = None,
        act: str = "softmax",
        *,
        self_mask: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("MultiGateMoE", in_dim=in_dim, n_experts=n_experts, n_gates=n_gates)
        if act not in ACTIVATIONS:
            raise ValueError(f"MultiGateMoE: act: expected 'softmax' or 'sigmoid', got {act!r}")
        self.in_dim, self.n_experts, self.n_gates, self.act = in_dim, n_experts, n_gates, act
        # Values are needed here, whatever device a context sets.
        full = torch.ones(n_gates, n_experts, dtype=torch.bool, device="cpu")
        given = None if mask is None else _checked_mask("mask", mask, n_gates, n_experts)
        own = None if self_mask is None else _checked_mask("self_mask", self_mask, n_gates, n_experts)
        pairs = torch.stack([full if given is None else given, *([] if own is None else [own])])
        self.weight = nn.Parameter(torch.empty(int(pairs.sum()), in_dim, device=device, dtype=dtype))
        places = None if bool(pairs.all()) else pairs.flatten().nonzero().flatten()
        self._tables: dict[str, list[Any]] = {}
        for name, table in (("mask", given), ("self_mask", own), ("places", places)):
            if table is not None:
                self._tables[name] = table.tolist()
            self.register_buffer(name, None if table is None else table.to(self.weight.device, copy=True), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as a torch.nn.Linear of in_dim features does."""
        bound = 1 / math.sqrt(self.in_dim)
        nn.init.uniform_(self.weight, -bound, bound)

    def _fill(self) -> None:
        """Give the buffers their values, which no state dict has."""
        for name, table in self._tables.items():
            buffer = getattr(self, name)
            if buffer.is_meta and not self.weight.is_meta:
                buffer = torch.empty_like(buffer, device=self.weight.device)
                setattr(self, name, buffer)
            if not buffer.is_meta:
                # A model that was made in inference mode is changed in place there only.
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(torch.tensor(table, dtype=buffer.dtype, device="cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = super()
        module._apply(fn, recurse)
        self._fill()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        module: Any = super()
        module._load_from_state_dict(*args, **kwargs)
        self._fill()

    def logits(self, x: Tensor) -> Tensor:
        """What each gate says of each expert, ``[B, N, n_gates, n_experts]``: N is 1, or 2 with self gates. Masked entries are 0.

        Parameters
        ----------
        x
            ``[B, in_dim]``, or ``[B, n_gates, in_dim]`` where each gate has an input of its own.

        Raises
        ------
        TypeError
            If x is not floating point.
        ValueError
            If x has another shape.
        """
        if not x.is_floating_point():
            raise TypeError(f"MultiGateMoE: x: expected a floating point tensor, got {x.dtype}")
        kinds, pairs = (1 if self.self_mask is None else 2), self.n_gates * self.n_experts
        if x.dim() == 2 and x.shape[1] == self.in_dim:
            said = F.linear(x, self.weight)
            if self.places is not None:
                said = said.new_zeros(len(x), kinds * pairs).index_copy(1, self.places, said)
            return said.reshape(len(x), kinds, self.n_gates, self.n_experts)
        if x.dim() == 3 and x.shape[1:] == (self.n_gates, self.in_dim):
            rows: Tensor = self.weight
            if self.places is not None:
                rows = rows.new_zeros(kinds * pairs, self.in_dim).index_copy(0, self.places, rows)
            return torch.einsum("bgi,ngei->bnge", x, rows.reshape(kinds, self.n_gates, self.n_experts, self.in_dim))
        expected = f"[B, {self.in_dim}] or [B, {self.n_gates}, {self.in_dim}]"
        raise ValueError(f"MultiGateMoE: x: expected shape {expected}, got {tuple(x.shape)}")

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the experts' outputs by each gate.

        Parameters
        ----------
        x
            The gates' input, as :meth:`logits` takes it.
        z
            ``[B, n_experts, D]``: the experts' outputs, in the order of the masks' columns.

        Returns
        -------
        out : Tensor
            ``[B, n_gates, D]`` in z's dtype.
        probs : Tensor
            ``[B, n_gates, n_experts]``, the weights without those of the self gates; see :func:`taskloom.gate_statistics`.
        """
        said = self.logits(x)
        own = None if self.self_mask is None else said[:, 1]
        return multi_gate_combine(said[:, 0], z, self.mask, activation=self.act, self_logits=own, self_mask=self.self_mask)

    def extra_repr(self) -> str:
        """The sizes, as in torch's own modules."""
        own = "" if self.self_mask is None else ", self gates"
        return f"in_dim={self.in_dim}, n_experts={self.n_experts}, n_gates={self.n_gates}, act={self.act!r}{own}"


class SelfGate(nn.Module):
    """A gate over a group's own experts: the sigmoid of a group's only expert, else a softmax over them.

    Parameters
    ----------
    in_dim
        Features of the gate's input.
    n_experts
        Experts of the group.

    Raises
    ------
    TypeError
        If a size is no integer.
    ValueError
        If a size is below 1.

    Notes
    -----
    Source: HoME, arXiv 2408.05430. Where a gate over more experts is added to it, :class:`MultiGateMoE` does both in one call.
    """

    def __init__(self, in_dim: int, n_experts: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_sizes("SelfGate", in_dim=in_dim, n_experts=n_experts)
        self.in_dim, self.n_experts = in_dim, n_experts
        self.gate = nn.Linear(in_dim, n_experts, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The weighted sum of the group's experts.

        Parameters
        ----------
        x
            ``[B, in_dim]``.
        z
            ``[B, n_experts, D]``.

        Returns
        -------
        Tensor
            ``[B, D]`` in z's dtype.

        Raises
        ------
        TypeError
            If x is not floating point.
        ValueError
            If x or z has another shape.
        """
        check_features("SelfGate", x, self.in_dim)
        activation = "sigmoid" if self.n_experts == 1 else "softmax"
        return multi_gate_combine(self.gate(x)[:, None], z, activation=activation)[0][:, 0]
