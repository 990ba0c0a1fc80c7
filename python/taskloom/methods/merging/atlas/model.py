"""A frozen model whose weights are its own plus task vectors, each block of each scaled by a coefficient that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _NormBase

from taskloom.methods.merging.atlas.blocks import Vectors, check_finite, find_blocks, read_vectors
from taskloom.methods.merging.atlas.coefficients import Coefficients, Granularity, check_granularity
from taskloom.methods.merging.atlas.compose import Composer
from taskloom.methods.merging.atlas.held import HeldWeights
from taskloom.methods.merging.atlas.linearize import taylor
from taskloom.methods.merging.atlas.partition import Partition
from taskloom.methods.merging.atlas.recompute import Recomputing
from taskloom.methods.merging.places import one_a_place, place_of
from taskloom.ops._backends import active_transform


class AtlasModel(Coefficients):
    """aTLAS: a model with weights ``theta0[b] + sum_t coef[t, b] * tau_t[b]``, of which only ``coef`` is trained.

    Parameters
    ----------
    model
        The base. It is held, not copied, and its parameters stop requiring grad.
    task_vectors
        n of them: :class:`taskloom.TaskVector` or other mappings from a parameter's name to its change, in a sequence or by id. They are
        kept in their own dtypes, on the model's device; what is there already is not copied, and is not to be written to afterwards.
    granularity
        ``"block"`` (default): a coefficient for each vector and block. ``"vector"``: one for each vector.
    partitions
        K, 1 to 256 (default 1): each block's entries fall at random into K groups that have a coefficient each (aTLAS x K).
    partition_seed
        Of these groups. Default 0.
    matrices_only
        Whether only parameters with two dimensions are blocks, and the others stay the base's. Default False.
    target_modules
        Whose parameters are blocks: names, a pattern for the whole path, or ``"all-linear"``, as in PEFT. Default None: all of them.
    linearized
        Whether the model is its first-order Taylor expansion at the base's weights, so that the result is linear in ``coef``; for task
        vectors of the regime ``"linear"``. Default False.

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
        If there is no vector, a vector lacks a block, has another shape, values that are not finite or another regime, or ``partitions``
        is not in 1..256 or larger than every block.

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
        linearized: bool = False,
    ) -> None:
        check_granularity(granularity)
        if granularity == "vector" and partitions != 1:
            raise ValueError(f"partitions: expected 1 with granularity 'vector', got {partitions}")
        blocks = find_blocks(model, target_modules, matrices_only)
        parameters = [model.get_parameter(name) for name in blocks.names]
        groups = Partition(blocks.names, [one.shape for one in parameters], partitions, partition_seed, parameters[0].device)
        pool = read_vectors(model, blocks, task_vectors, regime="linear" if linearized else "nonlinear")
        double = any(one.dtype == torch.float64 for one in (*parameters, *(delta for task in pool.deltas for delta in task)))
        like = torch.empty(0, dtype=torch.float64 if double else torch.float32, device=parameters[0].device)
        super().__init__(model, pool.ids, blocks.names, granularity, partitions, like)
        self._pool, self._groups = pool, groups
        self._compose_blocks = Composer(pool, groups)
        self._aliases = blocks.aliases
        self._swapped = tuple(one_a_place(model, aliases) for aliases in blocks.aliases)
        self.matrices_only, self.target_modules = matrices_only, target_modules
        self.linearized = linearized
        self._statistics = _statistics(model)
        places = [[place_of(model, name) for name in names] for names in self._swapped]
        self._recomputing = Recomputing(places, [module for _, module in self._statistics])
        self._held: HeldWeights | None = None

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
        return None if parts is None else dict(zip(self.block_names, parts, strict=True))

    def belongs_to(self) -> dict[str, Any]:
        """What the coefficients belong to, in plain values."""
        grouped = {"partitions": self.partitions, "partition_seed": self.partition_seed} if self.partitions > 1 else {"partitions": 1}
        return super().belongs_to() | grouped | {"linearized": self.linearized}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with the composed weights; arguments and result are the model's.

        A backward pass has to begin at what it returns where parts of the model are checkpointed: from an inner tensor that a hook took
        away, they would run again with the base's weights.
        """
        if self.merged:
            return self.model(*args, **kwargs)
        weights = self._composed()
        if self.linearized:
            return taylor(self._run, self._recomputing.base(), weights, args, kwargs)
        outputs = self._run(weights, args, kwargs)
        if torch.is_grad_enabled() and not is_compiling() and active_transform() is None:
            self._recomputing.watch(
                (args, kwargs), outputs, weights, self._held is not None, partial(self._compose_again, self.coef._version)
            )
        return outputs

    def _compose_again(self, version: int) -> list[Tensor]:
        """The weights of an earlier forward pass, for another backward pass through it."""
        if self.coef._version != version:
            raise RuntimeError(
                "AtlasModel: coef was changed since the forward pass, whose weights an earlier backward pass has freed; "
                "make all of its backward passes before the optimizer's step"
            )
        with torch.enable_grad():
            return self._compose()

    def _run(self, weights: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward pass with other blocks."""
        tensors = _named(self._swapped, weights) | self._kept_statistics()
        return torch.func.functional_call(self.model, tensors, args, kwargs, tie_weights=False)

    def materialize(self) -> dict[str, Tensor]:
        """The state dict of the model with the composed weights; what is no block shares memory with the base's.

        Returns
        -------
        dict
            By the names of ``model.state_dict()``, detached.

        Raises
        ------
        RuntimeError
            If the model is linearised: no weights give its results.
        """
        self._refuse_linearized("materialize")
        state = cast(dict[str, Tensor], dict(self.model.state_dict()))
        if self.merged:
            return state
        with torch.no_grad():
            return state | {name: one for name, one in _named(self._aliases, self._compose()).items() if name in state}

    def merge_(self) -> nn.Module:
        """Write the composed weights into the base, in place, and return it; from then on the adapter only calls it.

        Raises
        ------
        RuntimeError
            If it was done before, or the model is linearised.
        ValueError
            If a coefficient or a composed weight is not finite; the base is unchanged.
        """
        self._refuse_linearized("merge_")
        self._check_mergeable()
        with torch.no_grad():
            weights = self._compose()
            check_finite("AtlasModel.merge_: composed weights", self.block_names, weights)
            for parameter, weight in zip(self._recomputing.base(), weights, strict=True):
                parameter.copy_(weight)
        self._begin_merge()
        return self.model

    @contextmanager
    def compose(self, *, accumulate: bool = False) -> Iterator[Self]:
        """Compose the weights once for all forward passes in the block, instead of once for each.

        A change of ``coef`` or of the base inside, by an optimizer's step, is seen: the weights are composed anew for the next forward
        pass. What is written through ``.data`` is not. Inside another such block, and for a compiled forward pass, this one does nothing.

        Parameters
        ----------
        accumulate
            Default False: the forward passes share the composition's graph, so their losses take one ``backward`` together (their sum, as
            in task addition). True: each may have a ``backward`` of its own, which frees its activations; the weights' gradients are summed
            in memory of one more model, and ``coef.grad`` is there when the block ends.
        """
        if self._held is not None:
            yield self
            return
        held = self._held = HeldWeights(self._compose, self._recomputing.base, accumulate)
        try:
            yield self
            held.flush()
        finally:
            self._held = None

    @contextmanager
    def installed(self) -> Iterator[nn.Module]:
        """Put the composed weights into the model for as long as the block lasts, for what is no forward pass, such as ``generate``.

        They take no part in autograd; the parameters themselves are back in their places afterwards.

        Raises
        ------
        RuntimeError
            If the model is linearised.
        """
        self._refuse_linearized("installed")
        if self.merged:
            yield self.model
            return
        with torch.no_grad():
            weights = self._compose()
        with self._recomputing.installed(weights):
            yield self.model

    def fingerprints(self) -> list[float]:
        """The norm of each vector over the blocks."""
        squares = [
            torch.stack([torch.linalg.vector_norm(one, dtype=torch.float64) for one in task]).square().sum() for task in self._pool.deltas
        ]
        norms: list[float] = torch.stack(squares).sqrt().tolist()
        return norms

    def _refuse_linearized(self, name: str) -> None:
        if self.linearized:
            raise RuntimeError(f"AtlasModel.{name}: a linearized model is no model with other weights")

    def _composed(self) -> Sequence[Tensor]:
        # Whether a tensor has changed since is nothing that compiled code can ask.
        return self._compose() if self._held is None or is_compiling() else self._held.weights(self.coef)

    def _compose(self) -> list[Tensor]:
        """The weights of the blocks; of a linearised model, what is added to them."""
        base = self._recomputing.base()
        if self.linearized:
            base = [torch.zeros_like(one) for one in base]
        return self._compose_blocks(base, self.expanded())

    def _kept_statistics(self) -> dict[str, Tensor]:
        """Copies of the running statistics that a forward pass in training would change."""
        found: dict[str, Tensor] = {}
        for path, module in self._statistics:
            if module.training:
                found |= {f"{path}.{name}" if path else name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no compose() block, whose end would have to come for it too.
        return {**self.__dict__, "_held": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._recomputing.expect_base("moved or converted")
        if self._held is not None:
            self._held.flush()
        super()._apply(fn, recurse)
        self._pool = self._pool.to(self.coef.device)
        self._groups = self._groups.to(self.coef.device)
        self._compose_blocks = Composer(self._pool, self._groups)
        return self


def _named(names: Sequence[Sequence[str]], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Each weight by all of its names."""
    return {name: one for own, one in zip(names, weights, strict=True) for name in own}


def _statistics(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers with running statistics, by their first path."""
    return [(path, one) for path, one in model.named_modules() if isinstance(one, _NormBase)]
