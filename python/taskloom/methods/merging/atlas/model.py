"""A frozen model whose weights are its own plus task vectors, each block of each scaled by a coefficient that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taskloom.methods.merging.atlas.blocks import Vectors, find_blocks, read_vectors
from taskloom.methods.merging.atlas.partition import Partition
from taskloom.ops import block_scale_merge

Granularity = Literal["block", "vector"]


class AtlasModel(nn.Module):
    """aTLAS: a model with weights ``theta0[b] + sum_t coef[t, b] * tau_t[b]``, of which only ``coef`` is trained.

    Parameters
    ----------
    model
        The base. It is held, not copied, and its parameters stop requiring grad.
    task_vectors
        n of them: :class:`taskloom.TaskVector` or other mappings from a parameter's name to its change, in a sequence or by id. They are
        kept in their own dtypes, on the model's device.
    granularity
        ``"block"`` (default): a coefficient for each vector and block. ``"vector"``: one for each vector.
    partitions
        K, 1 to 256 (default 1): each block's entries fall at random into K groups that have a coefficient each (aTLAS x K).
    partition_seed
        Of these groups. Default 0.
    matrices_only
        Whether only parameters with two dimensions are blocks, and the others stay the base's. Default False.
    target_modules
        Whose parameters are blocks: names, or a pattern for the whole path, as in PEFT. Default None: all of them.

    Attributes
    ----------
    coef
        The coefficients, 0 at first: ``[n, m]``, ``[n]`` or ``[n, m, K]``; float32, or float64 where a block or a vector is.
    block_names
        The parameters that are blocks; one that several modules share is one block, under its first name.
    vector_ids
        Those of the task vectors.
    partition
        Each block's groups as uint8, or None.

    Raises
    ------
    TypeError
        If a block is no floating-point tensor, or an argument of the wrong kind.
    ValueError
        If there is no vector, a vector lacks a block, has another shape or values that are not finite, or ``partitions`` is not in
        1..256 or larger than every block.

    Warns
    -----
    UserWarning
        If a vector has names that are no parameter of the model, such as buffers: they are ignored.

    Notes
    -----
    Source: aTLAS, Zhang et al., NeurIPS 2024, arXiv 2407.02880. Computed by :func:`taskloom.block_scale_merge`, one call a forward pass;
    beside the base and the vectors there is one composed copy of the blocks, and a byte an entry where K > 1. The buffers stay the base's:
    running statistics are not updated in training.
    """

    coef: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        task_vectors: Vectors,
        *,
        granularity: Granularity = "block",
        partitions: int = 1,
        partition_seed: int = 0,
        matrices_only: bool = False,
        target_modules: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if granularity not in ("block", "vector"):
            raise ValueError(f"granularity: expected 'block' or 'vector', got {granularity!r}")
        if granularity == "vector" and partitions != 1:
            raise ValueError(f"partitions: expected 1 with granularity 'vector', got {partitions}")
        blocks = find_blocks(model, target_modules, matrices_only)
        parameters = [model.get_parameter(name) for name in blocks.names]
        self._groups = Partition(blocks.names, [one.shape for one in parameters], partitions, partition_seed, parameters[0].device)
        self._pool = read_vectors(model, blocks, task_vectors)
        self._blocks = blocks
        self.granularity: Granularity = granularity
        self.matrices_only = matrices_only
        model.requires_grad_(False)
        self.model = model
        self.merged = False
        self._held: _Held | None = None
        double = any(one.dtype == torch.float64 for one in (*parameters, *(delta for task in self._pool.deltas for delta in task)))
        n, m = len(self._pool.ids), len(blocks.names)
        shape = (n,) if granularity == "vector" else (n, m) if partitions == 1 else (n, m, partitions)
        self.coef = nn.Parameter(torch.zeros(shape, dtype=torch.float64 if double else torch.float32, device=parameters[0].device))

    @property
    def block_names(self) -> tuple[str, ...]:
        """The parameters that are blocks, in the order of the second dimension of ``coef``."""
        return self._blocks.names

    @property
    def vector_ids(self) -> tuple[str, ...]:
        """The task vectors' ids, in the order of the first dimension of ``coef``."""
        return self._pool.ids

    @property
    def partitions(self) -> int:
        """K, the number of groups of a block."""
        return self._groups.groups

    @property
    def partition_seed(self) -> int:
        """The seed of the groups."""
        return self._groups.seed

    @property
    def partition(self) -> dict[str, Tensor] | None:
        """The group of each entry of each block, uint8, by the block's name; None for K = 1."""
        parts = self._groups.parts
        return None if parts is None else dict(zip(self._blocks.names, parts, strict=True))

    def extra_repr(self) -> str:
        """The sizes."""
        groups = f", partitions={self.partitions}" if self.partitions > 1 else ""
        return f"{len(self.vector_ids)} task vectors, {len(self.block_names)} blocks, {self.coef.numel()} coefficients{groups}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with the composed weights; arguments and result are the model's."""
        if self.merged:
            return self.model(*args, **kwargs)
        weights = self._named(self._composed())
        return torch.func.functional_call(self.model, weights | self._kept_statistics(), args, kwargs, tie_weights=False)

    def materialize(self) -> dict[str, Tensor]:
        """The state dict of the model with the composed weights; what is no block shares memory with the base's.

        Returns
        -------
        dict
            By the names of ``model.state_dict()``, detached.
        """
        state = cast(dict[str, Tensor], dict(self.model.state_dict()))
        if self.merged:
            return state
        with torch.no_grad():
            return state | {name: one for name, one in self._named(self._compose()).items() if name in state}

    def merge_(self) -> nn.Module:
        """Write the composed weights into the base, in place, and return it; from then on the adapter only calls it.

        Raises
        ------
        RuntimeError
            If it was done before.
        """
        if self.merged:
            raise RuntimeError("AtlasModel.merge_: the coefficients are merged already")
        with torch.no_grad():
            for name, weight in zip(self._blocks.names, self._compose(), strict=True):
                self.model.get_parameter(name).copy_(weight)
        self.merged = True
        # A step on coefficients that no longer do anything would be an error; autograd says so.
        self.coef.requires_grad_(False)
        return self.model

    @contextmanager
    def compose(self) -> Iterator[Self]:
        """Compose the weights once for all forward passes in the block, instead of once for each.

        A change of ``coef`` inside, by an optimizer's step, is seen: the weights are composed anew for the next forward pass. All forward
        passes of one composition share its graph, so their losses take one ``backward`` together (their sum, as in task addition).
        """
        if self._held is not None:
            yield self
            return
        self._held = _Held()
        try:
            yield self
        finally:
            self._held = None

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

    def _composed(self) -> Sequence[Tensor]:
        return self._compose() if self._held is None else self._held.weights(self.coef, self._compose)

    def _compose(self) -> list[Tensor]:
        """The weights of the blocks."""
        base = [self.model.get_parameter(name) for name in self._blocks.names]
        coef = self.coef[:, None].expand(-1, len(base)) if self.granularity == "vector" else self.coef
        merged = block_scale_merge(base, self._pool.deltas, coef, self._groups.parts)
        assert isinstance(merged, list)
        return merged

    def _named(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weights by every name that the model has for them."""
        return {name: one for aliases, one in zip(self._blocks.aliases, weights, strict=True) for name in aliases}

    def _kept_statistics(self) -> dict[str, Tensor]:
        """Copies of the running statistics that a forward pass in training would change."""
        if not self.training:
            return {}
        return {
            f"{path}.{name}" if path else name: buffer.clone()
            for path, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, _NormBase) and module.training
            for name, buffer in module.named_buffers(recurse=False)
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.coef.data
        module: Any = super()
        module._apply(fn, recurse)
        # The op takes coefficients in float32 or float64, and the vectors keep their dtypes: half() and the like mean the model.
        if self.coef.dtype not in (torch.float32, torch.float64):
            self.coef.data = before.to(self.coef.device)
        self._pool = self._pool.to(self.coef.device)
        self._groups = self._groups.to(self.coef.device)
        return self


class _Held:
    """The weights of one composition, for as long as coefficients and what autograd needs are the same."""

    def __init__(self) -> None:
        self._weights: Sequence[Tensor] | None = None
        self._of: tuple[int, int] | None = None
        self._with_grad = False

    def weights(self, coef: nn.Parameter, compose: Callable[[], list[Tensor]]) -> Sequence[Tensor]:
        now = (id(coef), coef._version)
        grad = torch.is_grad_enabled()
        if self._weights is None or now != self._of or (grad and not self._with_grad):
            self._weights, self._of, self._with_grad = compose(), now, grad
        return self._weights
