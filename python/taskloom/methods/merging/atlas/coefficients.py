"""What every aTLAS adapter has: coefficients, the vectors and blocks that they belong to, and a state dict of these alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskloom.methods.merging.atlas.blocks import shown

Granularity = Literal["block", "vector"]
_EXTRA = "_extra_state"


def check_granularity(granularity: str) -> None:
    """Raise ValueError where it is neither of the two."""
    if granularity not in ("block", "vector"):
        raise ValueError(f"granularity: expected 'block' or 'vector', got {granularity!r}")


class Coefficients(nn.Module, ABC):
    """A model that is held frozen, and the coefficients of task vectors on its blocks; the base of the adapters.

    Its state dict is ``coef``, and under ``_extra_state`` what the coefficients belong to: ids of the vectors, names of the blocks and how
    entries are grouped. Loading one that belongs to others raises ValueError before anything is changed. The model and the vectors are not
    in it.

    Attributes
    ----------
    coef
        0 at first; float32 or float64. In the shape of :meth:`expanded` but for the last dimensions, which ``granularity="vector"`` and
        ``partitions=1`` do not have.
    model
        The base.
    merged
        Whether the coefficients are in the base's weights.
    """

    coef: nn.Parameter

    def __init__(
        self, model: nn.Module, ids: Sequence[str], names: Sequence[str], granularity: Granularity, partitions: int, like: Tensor
    ) -> None:
        super().__init__()
        model.requires_grad_(False)
        self.model = model
        self.merged = False
        self.granularity: Granularity = granularity
        self._prefix = ""
        self._ids, self._names = tuple(ids), tuple(names)
        n, m = len(self._ids), len(self._names)
        shape = (n,) if granularity == "vector" else (n, m) if partitions == 1 else (n, m, partitions)
        self.coef = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        hooked: Any = self
        hooked.register_load_state_dict_post_hook(_expect_no_model)

    @property
    def block_names(self) -> tuple[str, ...]:
        """The parameters that are blocks, in the order of the second dimension of ``coef``."""
        return self._names

    @property
    def vector_ids(self) -> tuple[str, ...]:
        """The task vectors' ids, in the order of the first dimension of ``coef``."""
        return self._ids

    def belongs_to(self) -> dict[str, Any]:
        """What the coefficients belong to, in plain values."""
        return {"granularity": self.granularity, "task_vectors": list(self._ids), "blocks": list(self._names)}

    @abstractmethod
    def fingerprints(self) -> list[float]:
        """A number for each vector, which another one hardly has."""

    @abstractmethod
    def merge_(self) -> nn.Module:
        """Write the composed weights into the base and return it."""

    @abstractmethod
    def materialize(self) -> dict[str, Tensor]:
        """The state dict of the model with the composed weights."""

    def expanded(self) -> Tensor:
        """The coefficients of all blocks, ``[n, m]`` or ``[n, m, K]``."""
        return self.coef[:, None].expand(-1, len(self._names)) if self.granularity == "vector" else self.coef

    def penalty(self, p: Literal[1, 2] = 1, factor: float = 0.5) -> Tensor:
        """Regularise the coefficients: ``factor`` times the mean over blocks (and groups) of the p-norm over the vectors.

        Raises
        ------
        ValueError
            If p is neither 1 nor 2.
        """
        if p not in (1, 2):
            raise ValueError(f"p: expected 1 or 2, got {p!r}")
        norms: Tensor = torch.linalg.vector_norm(self.coef, ord=p, dim=0)
        return factor * norms.mean()

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{len(self._ids)} task vectors, {len(self._names)} blocks, {self.coef.numel()} coefficients"

    def get_extra_state(self) -> dict[str, Any]:
        """What the coefficients belong to."""
        return self.belongs_to()

    def set_extra_state(self, state: Any) -> None:
        """Nothing: it was compared before."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The coefficients and what they belong to; arguments as of ``nn.Module``."""
        module: Any = super()
        state = module.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in [name for name in state if name.startswith(f"{prefix}model.")]:
            del state[name]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # For the hook that is called at the end, which is not told.
        self._prefix = prefix
        state = state_dict.get(prefix + _EXTRA)
        if state is not None:
            check_same(self.belongs_to(), state, "state_dict")
        coef = state_dict.get(f"{prefix}coef")
        if self.merged and coef is not None and not torch.equal(coef.to(self.coef), self.coef):
            raise RuntimeError("state_dict: other coefficients are merged into the base already, these would do nothing")
        module: Any = super()
        module._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, gradient = self.coef.data, None if self.coef.grad is None else self.coef.grad.data
        module: Any = super()
        module._apply(fn, recurse)
        # The ops take coefficients in float32 or float64, and the vectors keep their dtypes: half() and the like mean the model.
        if self.coef.dtype not in (torch.float32, torch.float64):
            self.coef.data = before.to(self.coef.device)
            self.coef.grad = None if gradient is None else gradient.to(self.coef.device)
        return self

    def _check_mergeable(self) -> None:
        """Raise before the base's weights are lost."""
        self._check_not_merged("merge_")
        if not torch.isfinite(self.coef).all():
            raise ValueError(f"{type(self).__name__}.merge_: expected finite coefficients, coef has NaN or infinity")

    def _begin_merge(self) -> None:
        """Say that the base's weights hold the coefficients from now on."""
        self.merged = True
        # A step on coefficients that no longer do anything would be an error; autograd says so.
        self.coef.requires_grad_(False)

    def _check_not_merged(self, name: str) -> None:
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.{name}: the coefficients are merged into the base already")


def check_same(own: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where coefficients belong to other vectors, blocks or groups."""
    for name, expected in own.items():
        found = other.get(name)
        if found == expected:
            continue
        if isinstance(expected, list) and isinstance(found, list):
            missing, beyond = [one for one in expected if one not in found], [one for one in found if one not in expected]
            differs = "; ".join(f"{what} {shown(some)}" for what, some in (("without", missing), ("with", beyond)) if some)
            raise ValueError(f"{where}: {name}: the coefficients belong to others: {differs or 'the same in another order'}")
        raise ValueError(f"{where}: {name}: expected {expected!r}, got {found!r}")


def _expect_no_model(module: nn.Module, incompatible: Any) -> None:
    """The base's tensors are not in an adapter's state, so none is missing."""
    own = f"{module._prefix}model."
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(own)]
