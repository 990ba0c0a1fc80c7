"""A linear layer with a frozen weight and a trained update that a kernel makes of two thin factors (SNELL, SNELLA)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taskloom.nn.base_layers import check_base_layer
from taskloom.nn.inject import LayerConfig
from taskloom.ops import kernel_linear, kernel_merge
from taskloom.ops.lowrank._kernel_arguments import check_gate, check_kernel, check_sparsity

# alpha, gamma, beta at the start of training.
_INITIAL = {"mixk": (1.0, 1.0, 0.0), "sigmoid": (1.0, 0.0, 1.0), "rbf": (1.0, 0.0, 1.0)}
_SCALARS = ("alpha", "gamma", "beta")


@dataclass(frozen=True, kw_only=True)
class KernelConfig(LayerConfig):
    """How layers are given kernel updates.

    Attributes
    ----------
    r
        Columns of both factors over all chunks, what is called the rank. Default 32.
    kernel
        As of :func:`taskloom.kernel_merge`. Default ``"mixk"``, SNELLA's; SNELL's is ``"pwl"``.
    chunks
        Chunks that the columns are divided into; r must be a multiple. Default 2.
    scale
        Chunk p is weighted by scale * (-1)^p. Default 0.1.
    sparsity
        Share of the update's entries that the gate zeroes, 0 to 1. Default 0.
    gate
        As of :func:`taskloom.kernel_merge`. Default ``"magnitude"``.
    dropout
        Of the branch's input, in training. Default 0.
    drop_path
        Probability with which a sample's branch is left out, in training. Default 0.
    learn_coef
        Whether the chunks' weights are trained too. Default False.
    target_modules
        As of :class:`LayerConfig`; default ``("q", "k", "v", "attn.proj", "fc1", "fc2")``, the layers of a vision transformer of timm
        whose ``qkv`` is taken apart.
    """

    r: int = 32
    kernel: str = "mixk"
    chunks: int = 2
    scale: float = 0.1
    sparsity: float = 0.0
    gate: str | None = "magnitude"
    dropout: float = 0.0
    drop_path: float = 0.0
    learn_coef: bool = False
    target_modules: str | Sequence[str] = ("q", "k", "v", "attn.proj", "fc1", "fc2")

    def __post_init__(self) -> None:
        for name in ("r", "chunks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"KernelConfig: {name}: expected an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"KernelConfig: {name}: expected at least 1, got {value}")
        if self.r % self.chunks:
            raise ValueError(f"KernelConfig: r: expected a multiple of chunks, {self.chunks}, got {self.r}")
        check_kernel("KernelConfig", self.kernel)
        check_gate("KernelConfig", self.gate)
        check_sparsity("KernelConfig", self.sparsity)
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"KernelConfig: {name}: expected a probability from 0 to below 1, got {getattr(self, name)}")
        if not (math.isfinite(self.scale) and self.scale):
            raise ValueError(f"KernelConfig: scale: expected a finite number other than 0, got {self.scale}")

    def check(self, layer: nn.Module) -> None:
        """Raise TypeError or ValueError where :class:`KernelLinear` cannot take the place of ``layer``."""
        super().check(layer)
        check_base_layer("linear", layer)

    def build(self, linear: nn.Linear) -> KernelLinear:
        """The layer around ``linear``."""
        return KernelLinear(linear, self)

    def is_adapted(self, layer: nn.Module) -> bool:
        """Whether the layer is a :class:`KernelLinear`."""
        return isinstance(layer, KernelLinear)


class KernelLinear(nn.Module):
    """A ``torch.nn.Linear``, frozen, plus the update of :func:`taskloom.kernel_merge`.

    Parameters
    ----------
    linear
        The layer to adapt. It becomes ``base_layer`` and no longer requires grad.
    config
        A :class:`KernelConfig`; default ``KernelConfig()``.
    **options
        Fields of the configuration that differ from it, such as ``r=8``.

    Attributes
    ----------
    A, B
        Factors ``[chunks, in_features, r / chunks]`` and ``[chunks, out_features, r / chunks]``, float32 (float64 for a float64 layer),
        initialised uniformly as ``kaiming_uniform_(a=sqrt(5))`` does. So the update is not 0 at the start.
    alpha, gamma, beta
        Trained scalars of the kernels that have them: mixk starts at 1, 1, 0, sigmoid and rbf at 1, 0, 1. None otherwise.
    coef
        Weight of each chunk; a buffer, or a parameter where the configuration's ``learn_coef``.
    sparsity
        The gate's quantile, which may be set at any time.

    Raises
    ------
    TypeError
        If ``linear`` is not a ``torch.nn.Linear``, or one that is quantised, parametrised or has a forward pass of its own.
    ValueError
        If the configuration is not valid.

    Notes
    -----
    Source: SNELL (arXiv 2411.01800) and SNELLA (arXiv 2510.24037). In training nothing of the weight's size is kept for the backward. With
    dropout or drop-path the layer and its update are computed one after the other, otherwise in one product.
    """

    A: nn.Parameter
    B: nn.Parameter
    coef: Tensor
    alpha: nn.Parameter | None
    gamma: nn.Parameter | None
    beta: nn.Parameter | None
    kept_base: Tensor | None

    def __init__(self, linear: nn.Linear, config: KernelConfig | None = None, **options: object) -> None:
        super().__init__()
        check_base_layer("KernelLinear: linear", linear)
        fields = vars(config or KernelConfig()) | options
        self.config = KernelConfig(**fields)
        self.base_layer = linear.requires_grad_(False)
        weight = linear.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        chunks, width = self.config.chunks, self.config.r // self.config.chunks
        signs = torch.tensor([self.config.scale * (-1) ** p for p in range(chunks)], dtype=dtype, device=weight.device)
        self.A = nn.Parameter(torch.empty(chunks, linear.in_features, width, dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.empty(chunks, linear.out_features, width, dtype=dtype, device=weight.device))
        if self.config.learn_coef:
            self.coef = nn.Parameter(signs)
        else:
            self.register_buffer("coef", signs)
        initial = _INITIAL.get(self.config.kernel)
        for place, name in enumerate(_SCALARS):
            start = None if initial is None else nn.Parameter(torch.tensor(initial[place], dtype=dtype, device=weight.device))
            self.register_parameter(name, start)
        self.register_buffer("kept_base", None, persistent=False)
        self._sparsity = self.config.sparsity
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: KernelConfig) -> KernelLinear:
        """The layer around ``linear`` that ``config`` describes."""
        return cls(linear, config)

    def reset_parameters(self) -> None:
        """Draw new factors; scalars and the weights of chunks stay."""
        for factor in (self.A, self.B):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    @property
    def in_features(self) -> int:
        """Features of the inputs."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Features of the outputs."""
        return self.base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen weight, or the merged one after :meth:`merge`."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    @property
    def sparsity(self) -> float:
        """Share of the update's entries that the gate zeroes."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        self._sparsity = check_sparsity("KernelLinear", value)

    @property
    def merged(self) -> bool:
        """Whether the update is part of the weight."""
        return self.kept_base is not None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]``.

        Raises
        ------
        RuntimeError
            If the layer is merged and in training mode: the factors would get no gradient.
        """
        if self.merged:
            if self.training:
                raise RuntimeError("KernelLinear: the update is merged, so it cannot be trained; call unmerge() or eval()")
            y: Tensor = self.base_layer(x)
            return y
        if self.training and (self.config.dropout or self.config.drop_path):
            branch = self._update(nn.functional.dropout(x, self.config.dropout), None, None)
            y = self.base_layer(x)
            return y + self._drop_path(branch)
        return self._update(x, self.base_layer.weight, self.base_layer.bias)

    def _update(self, x: Tensor, base: Tensor | None, bias: Tensor | None) -> Tensor:
        return kernel_linear(
            x,
            self.A,
            self.B,
            self.coef,
            kernel=self.config.kernel,
            alpha=self.alpha,
            gamma=self.gamma,
            beta=self.beta,
            sparsity=self._sparsity,
            gate=self.config.gate,
            base=base,
            bias=bias,
        )

    def _drop_path(self, branch: Tensor) -> Tensor:
        """The branch, left out for some samples (entries of the first dimension) and scaled up for the others."""
        kept = 1 - self.config.drop_path
        if kept == 1:
            return branch
        samples = (branch.shape[0], *[1] * (branch.dim() - 1)) if branch.dim() > 1 else (1,)
        return branch * (branch.new_empty(samples).bernoulli_(kept) / kept)

    def _merge_into(self, base: Tensor | None) -> Tensor:
        return kernel_merge(
            self.A,
            self.B,
            self.coef,
            kernel=self.config.kernel,
            alpha=self.alpha,
            gamma=self.gamma,
            beta=self.beta,
            sparsity=self._sparsity,
            gate=self.config.gate,
            base=base,
        )

    def delta_weight(self) -> Tensor:
        """The update ``[out_features, in_features]``, in the factors' dtype, differentiable."""
        return self._merge_into(None)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight; the frozen weight is kept, so that :meth:`unmerge` restores its bits.

        Raises
        ------
        RuntimeError
            If it is merged already.
        """
        if self.merged:
            raise RuntimeError("KernelLinear: the update is merged already")
        merged = self._merge_into(self.base_layer.weight)
        self.kept_base = self.base_layer.weight.data
        self.base_layer.weight.data = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the frozen weight back.

        Raises
        ------
        RuntimeError
            If nothing is merged.
        """
        if self.kept_base is None:
            raise RuntimeError("KernelLinear: nothing is merged")
        self.base_layer.weight.data = self.kept_base
        self.kept_base = None

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What makes the update: A, B, coef, the kernel's scalars, and sparsity as a float64 scalar; detached, not copied."""
        named = {name: getattr(self, name) for name in ("A", "B", "coef", *_SCALARS)}
        state = {name: tensor.detach() for name, tensor in named.items() if tensor is not None}
        return state | {"sparsity": torch.tensor(self._sparsity, dtype=torch.float64)}

    @torch.no_grad()
    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`adapter_state_dict` gave; nothing is changed where it does not fit.

        Raises
        ------
        ValueError
            If names or shapes are not those of this layer.
        RuntimeError
            If the layer is merged.
        """
        if self.merged:
            raise RuntimeError("KernelLinear: the update is merged; call unmerge() before loading another")
        own = self.adapter_state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"KernelLinear: state: expected {', '.join(sorted(own))}, got {', '.join(sorted(state)) or 'nothing'}")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"KernelLinear: state: {name}: expected shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        self.sparsity = float(state["sparsity"])
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def get_extra_state(self) -> Tensor:
        """What ``state_dict`` holds beside parameters and buffers: the sparsity, which an allocator may have changed."""
        return torch.tensor(self._sparsity, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the sparsity from a state dict."""
        self.sparsity = float(state)

    def extra_repr(self) -> str:
        """What :func:`repr` says beside the base layer."""
        config = self.config
        return f"r={config.r}, kernel={config.kernel!r}, chunks={config.chunks}, sparsity={self._sparsity}, gate={config.gate!r}"
