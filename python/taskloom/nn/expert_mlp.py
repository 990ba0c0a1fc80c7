"""A sparse mixture of gated MLPs: k of E experts for each token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.nn.expert_products import expert_products, gather_rows
from taskloom.nn.router import TopKRouter
from taskloom.ops import TopKGate, expert_combine, expert_sort
from taskloom.ops._checks import check_floating
from taskloom.reference.arithmetic import autocast_dtype

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
# Blocks of transformers (5) that compute what this layer does. Others with the same parts may scale, clamp, norm or add something more.
BLOCKS = (
    "DeepseekV2Moe",
    "DeepseekV3MoE",
    "MixtralSparseMoeBlock",
    "OlmoeSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
)


def _activation_of(activation: str | Activation) -> Activation:
    if not isinstance(activation, str):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"ExpertMLP: activation: expected a function or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, with the matrices of gate and up in one, ``[2 * hidden, dim]``."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str | Activation = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)
        self.activation = _activation_of(activation)

    def reset_parameters(self) -> None:
        """Draw both layers anew."""
        self.gate_up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` to the same."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate) * up)
        return out


class ExpertMLP(nn.Module):
    """A sparse mixture of gated MLPs: each token is the weighed sum of what k of E experts make of it.

    Parameters
    ----------
    dim, hidden
        Sizes of a token and of an expert's hidden layer.
    num_experts, k
        Experts in all, and per token.
    activation
        ``"silu"`` (the default), ``"gelu"``, ``"relu"`` or a function of tensors.
    router
        A module that makes of tokens ``[T, dim]`` a :class:`taskloom.TopKGate`, as :class:`TopKRouter` does, or a tuple whose last two are
        weight and ids, ``[T, k]`` each, as transformers' routers do. Default None: a :class:`TopKRouter` with ``renormalize``.
    shared
        Something that all tokens go through, and whose result is added: the hidden size of a gated MLP, or a module. Default None.
    shared_gate
        A module that makes of tokens one logit each; the shared result is multiplied with its sigmoid. Default None.
    device, dtype
        Of the parameters that are made here.

    Attributes
    ----------
    gate_up_proj
        ``[E, 2 * hidden, dim]``: of each expert the rows of the gate's matrix, then those of the other.
    down_proj
        ``[E, dim, hidden]``. Both as transformers (5) stacks them.

    Raises
    ------
    TypeError
        If ``shared`` is neither a size nor a module.
    ValueError
        If a size is below 1, k is above E, or there is no such activation.

    Notes
    -----
    Source: Shazeer et al., arXiv 1701.06538; gated MLPs as in Mixtral, arXiv 2401.04088; shared experts as in DeepSeekMoE, arXiv
    2401.06066.

    Tokens are gathered once in the order of their experts (:func:`taskloom.expert_sort`), multiplied run by run where they lie, and added
    up by :func:`taskloom.expert_combine`. The products are torch's grouped ones where these serve the device and dtype: then the host does
    not wait for a GPU. Else, as for float64, sizes that are no multiple of 16 bytes, or in compiled code dtypes other than bfloat16, they
    are one product per expert. Differentiable once, and in forward mode and under torch.func's grad; twice with
    ``taskloom.backend("reference")``.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        activation: str | Activation = "silu",
        router: nn.Module | None = None,
        shared: int | nn.Module | None = None,
        shared_gate: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts), ("k", k)):
            if size < 1:
                raise ValueError(f"ExpertMLP: {name}: expected at least 1, got {size}")
        if k > num_experts:
            raise ValueError(f"ExpertMLP: k: expected at most {num_experts}, the number of experts, got {k}")
        if shared_gate is not None and shared is None:
            raise ValueError("ExpertMLP: shared_gate: expected None where nothing is shared, got a module")
        _check_shared(shared)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.hidden, self.num_experts, self.k = dim, hidden, num_experts, k
        self.activation = _activation_of(activation)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * hidden, dim, **made))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden, **made))
        self.router = TopKRouter(dim, num_experts, k, renormalize=True, **made) if router is None else router
        self.shared = GatedMLP(dim, shared, activation=activation, **made) if isinstance(shared, int) else shared
        self.shared_gate = shared_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the experts' matrices as nn.Linear draws its own: uniform within 1 / sqrt(inputs)."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    @classmethod
    def from_transformers(cls, block: nn.Module) -> ExpertMLP:
        """The same layer as a sparse block of a transformers (5) model: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 or -V3.

        Parameters
        ----------
        block
            A module of a class that has one of the names in :data:`BLOCKS`: with ``experts``, which have ``gate_up_proj``
            ``[E, 2 * hidden, dim]``, ``down_proj`` and ``act_fn``, and a router named ``gate``, which may be a :class:`TopKRouter`;
            perhaps with ``shared_expert`` or ``shared_experts`` and ``shared_expert_gate``. Parameters and modules are shared with it,
            not copied.

        Raises
        ------
        ValueError
            If the block is of another class, has not these parts, or its experts have more: biases, transposed or interleaved matrices,
            noise on their input.
        """
        experts: Any = getattr(block, "experts", None)
        router = getattr(block, "gate", None)
        kind = type(block).__name__
        if kind not in BLOCKS:
            raise ValueError(f"ExpertMLP: block: expected one of {', '.join(BLOCKS)}, got {kind}")
        gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
        if not (isinstance(router, nn.Module) and isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)):
            raise ValueError(
                f"ExpertMLP: block: expected a router `gate`, and `experts` with stacked gate_up_proj and down_proj, got {kind} without"
            )
        _check_experts(kind, block, experts, gate_up, down)
        count, dim, hidden = down.shape
        shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
        layer = cls(
            dim,
            hidden,
            count,
            _chosen_per_token(kind, router, block),
            activation=experts.act_fn,
            router=router,
            shared=shared,
            shared_gate=getattr(block, "shared_expert_gate", None),
            device="meta",
        )
        layer.gate_up_proj, layer.down_proj = gate_up, down
        return layer.train(block.training)

    def forward(self, x: Tensor, weight: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """``[..., dim]`` to the same; ``weight`` and ``ids``, ``[..., k]`` each, in place of what the router would choose."""
        check_floating("ExpertMLP", "x", x)
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"ExpertMLP: x: expected shape [..., {self.dim}], got {tuple(x.shape)}")
        if (weight is None) != (ids is None):
            raise ValueError(f"ExpertMLP: weight, ids: expected both or none, got only {'ids' if weight is None else 'weight'}")
        tokens = x.reshape(-1, self.dim)
        if weight is None or ids is None:
            routed = self.router(tokens)
            weight, ids = (routed.weight, routed.ids) if isinstance(routed, TopKGate) else routed[-2:]
        if ids.dim() == 0 or weight.shape != ids.shape:
            raise ValueError(
                f"ExpertMLP: weight, ids: expected the same shape [..., k] of both, got {tuple(weight.shape)} and {tuple(ids.shape)}"
            )
        chosen = ids.reshape(-1, ids.shape[-1])
        if len(chosen) != len(tokens):
            raise ValueError(f"ExpertMLP: ids: expected a row for each of {len(tokens)} tokens, got {tuple(ids.shape)}")
        out = self._mix(tokens, weight.reshape(chosen.shape), chosen)
        if self.shared is not None:
            out = out + self._shared(tokens)
        return out.reshape(x.shape)

    def _mix(self, tokens: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        order = expert_sort(ids, self.num_experts)
        dtype = autocast_dtype(tokens) or tokens.dtype
        rows = gather_rows(tokens.to(dtype), order.order // ids.shape[1], order.inverse)
        gate, up = expert_products(rows, self.gate_up_proj.to(dtype), order.offsets).chunk(2, dim=-1)
        made = expert_products(self.activation(gate) * up, self.down_proj.to(dtype), order.offsets)
        return expert_combine(made, weight, order.inverse).to(tokens.dtype)

    def _shared(self, tokens: Tensor) -> Tensor:
        assert self.shared is not None
        made: Tensor = self.shared(tokens)
        return made if self.shared_gate is None else torch.sigmoid(self.shared_gate(tokens)) * made

    def extra_repr(self) -> str:
        """The sizes."""
        return f"dim={self.dim}, hidden={self.hidden}, num_experts={self.num_experts}, k={self.k}"


def _check_shared(shared: Any) -> None:
    if shared is None or isinstance(shared, nn.Module):
        return
    if isinstance(shared, bool) or not isinstance(shared, int):
        raise TypeError(f"ExpertMLP: shared: expected a hidden size, a module or None, got {shared!r}")
    if shared < 1:
        raise ValueError(f"ExpertMLP: shared: expected a hidden size of at least 1, got {shared}")


def _check_experts(kind: str, block: nn.Module, experts: Any, gate_up: Tensor, down: Tensor) -> None:
    """Raise ValueError where experts compute something else than this module would."""
    count, dim, hidden = down.shape
    if gate_up.shape != (count, 2 * hidden, dim) or getattr(experts, "is_transposed", False):
        raise ValueError(
            f"ExpertMLP: block: expected gate_up_proj of shape {(count, 2 * hidden, dim)} beside down_proj of {tuple(down.shape)}, got "
            f"{tuple(gate_up.shape)} in {kind}"
        )
    if any(name.endswith("bias") for name, _ in experts.named_parameters()):
        raise ValueError(f"ExpertMLP: block: expected experts without biases, got those of {kind}")
    if not getattr(experts, "is_concatenated", True) or getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"ExpertMLP: block: expected gate_up_proj with the gate's rows first and nothing after down_proj, got {kind}")
    if not callable(getattr(experts, "act_fn", None)):
        raise ValueError(f"ExpertMLP: block: expected experts with an activation act_fn, got {kind} without")
    if getattr(block, "jitter_noise", 0):
        raise ValueError(f"ExpertMLP: block: expected no jitter_noise, got {getattr(block, 'jitter_noise', 0)} in {kind}")


def _chosen_per_token(kind: str, router: nn.Module, block: nn.Module) -> int:
    """Experts per token by the names that routers and blocks give it."""
    if isinstance(router, TopKRouter):
        return router.options.k
    for module in (router, block):
        for name in ("top_k", "k", "num_experts_per_tok"):
            found = getattr(module, name, None)
            if isinstance(found, int):
                return found
    raise ValueError(f"ExpertMLP: block: expected a router or block with top_k, got {kind} without")
