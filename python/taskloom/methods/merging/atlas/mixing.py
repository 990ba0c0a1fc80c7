"""A pool of task vectors under a budget of memory: few synthetic vectors, of the blocks that matter most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas.blocks import Vectors, by_id, find_blocks, read_vectors, shown
from taskloom.ops.masked import block_scale_merge_backward

Ranking = Literal["block", "vector", "random"]


class BlockGradients(Tensor):
    """A matrix ``[n, m]`` that knows the names of its columns' blocks; what is computed from it is a plain tensor, which does not."""

    block_names: tuple[str, ...]
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(values: Tensor, names: Sequence[str]) -> BlockGradients:
        """The same values, with names."""
        named = values.as_subclass(BlockGradients)
        named.block_names = tuple(names)
        return named

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockGradients:
        return self.of(self.clone(), self.block_names)


@contextmanager
def _requiring_grad(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Have parameters require grad inside the block; buffers that a forward pass changes, as running statistics, are restored too."""
    before = [one.requires_grad for one in parameters]
    buffers = [(one, one.clone()) for one in model.buffers()]
    try:
        for one in parameters:
            one.requires_grad_(True)
        yield
    finally:
        for one, required in zip(parameters, before, strict=True):
            one.requires_grad_(required)
        with torch.no_grad():
            for buffer, value in buffers:
                # Others may be in a graph, which would take it for a change.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def block_gradients(
    model: nn.Module,
    task_vectors: Vectors,
    loss_fn: Callable[[nn.Module], Tensor],
    *,
    matrices_only: bool = False,
    target_modules: str | Sequence[str] | None = None,
) -> BlockGradients:
    """The gradient of a loss with respect to the coefficients at 0: ``g[t, b] = <dL/dtheta[b], tau_t[b]>``.

    Parameters
    ----------
    model
        The base. It is left as it is, its gradients and buffers too.
    task_vectors
        n of them, as of :class:`AtlasModel`. They are read one after the other, so that a pool in checkpoints takes the memory of one.
    loss_fn
        Takes the model, gives a scalar.
    matrices_only, target_modules
        Which parameters are blocks, as of :class:`AtlasModel`.

    Returns
    -------
    BlockGradients
        A tensor, float64 ``[n, m]``, with the ``block_names`` of its m columns, in the order of the model's parameters. One backward pass
        through the model, whatever n is.

    Raises
    ------
    TypeError, ValueError
        As of :class:`AtlasModel`; or the loss is no scalar that depends on the blocks.
    """
    blocks = find_blocks(model, target_modules, matrices_only)
    named = by_id(task_vectors)
    parameters = [model.get_parameter(name) for name in blocks.names]
    with _requiring_grad(model, parameters), torch.enable_grad():
        loss = loss_fn(model)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: expected a scalar that depends on the model's blocks, got {got}")
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(one) if own is None else own for one, own in zip(parameters, found, strict=True)]
    rows = []
    for key, vector in named.items():
        pool = read_vectors(model, blocks, {key: vector}, getattr(vector, "regime", "nonlinear"))
        rows.append(block_scale_merge_backward(gradients, pool.deltas)[0, :, 0])
    return BlockGradients.of(torch.stack(rows), blocks.names)


def select_blocks(block_grads: Tensor, budget: int, *, by: Ranking = "block", seed: int = 0) -> Tensor:
    """The task vector that each block of each synthetic vector is taken from.

    Parameters
    ----------
    block_grads
        ``[n, m]``, as of :func:`block_gradients`.
    budget
        v, the number of synthetic vectors, 1 to n.
    by
        ``"block"`` (default): in each block the vectors with the largest ``|g|``. ``"vector"``: whole vectors with the largest mean of it
        (other scores of whole vectors, such as similarities of their data, can stand in for g as equal columns). ``"random"``: whole
        vectors drawn by ``seed``.
    seed
        Default 0.

    Returns
    -------
    Tensor
        int64 ``[v, m]``; equal gradients rank by the vectors' order.

    Raises
    ------
    TypeError
        If the budget is no integer.
    ValueError
        If it is not in 1..n, or the gradients are no finite matrix.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget: expected an integer, got {type(budget).__name__}")
    if block_grads.dim() != 2 or 0 in block_grads.shape:
        raise ValueError(f"block_grads: expected shape [n, m], got {tuple(block_grads.shape)}")
    if not torch.isfinite(block_grads).all():
        raise ValueError("block_grads: expected finite values, there are NaN or infinity")
    n, m = block_grads.shape
    if not 1 <= budget <= n:
        raise ValueError(f"budget: expected 1 to {n}, the number of task vectors, got {budget}")
    sizes = block_grads.detach().abs()
    if by == "block":
        return torch.argsort(sizes, dim=0, descending=True, stable=True)[:budget]
    if by == "vector":
        chosen = torch.argsort(sizes.double().mean(1), descending=True, stable=True)[:budget]
    elif by == "random":
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:budget].to(block_grads.device)
    else:
        raise ValueError(f"by: expected 'block', 'vector' or 'random', got {by!r}")
    return chosen[:, None].expand(budget, m).contiguous()


def _common_regime(named: Mapping[str, Mapping[str, Tensor]]) -> str:
    regimes = {getattr(vector, "regime", "nonlinear") for vector in named.values()}
    if len(regimes) > 1:
        raise ValueError("task_vectors: expected one regime, got linear and nonlinear ones; as_regime() converts one")
    regime: str = regimes.pop()
    return regime


def _column_names(block_grads: Tensor, names: Sequence[str] | None) -> tuple[str, ...]:
    told = block_grads.block_names if isinstance(block_grads, BlockGradients) else None
    if names is None and told is None:
        # The order of a vector's names says nothing: a file's is alphabetical, and a model's is not.
        raise ValueError("names: expected the blocks' names, which a plain tensor of gradients does not tell")
    if names is not None and told is not None and tuple(names) != told:
        raise ValueError(f"names: expected those of block_grads, {shown(told)}, got {shown(names)}")
    return tuple(names) if names is not None else told or ()


def mix_blocks(
    task_vectors: Vectors,
    block_grads: Tensor,
    budget: int,
    *,
    by: Ranking = "block",
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[TaskVector]:
    """Build few synthetic task vectors out of a pool: in each block, vector s takes that of the s-th ranked task.

    Parameters
    ----------
    task_vectors
        n of them; only the blocks that are taken are read.
    block_grads
        ``[n, m]``, as :func:`block_gradients` gives it for these vectors.
    budget, by, seed
        As of :func:`select_blocks`.
    names
        The m blocks' names, for gradients that are a plain tensor. Default None: those that :func:`block_gradients` told.

    Returns
    -------
    list of TaskVector
        v of them, as large as one of the pool each.

    Raises
    ------
    TypeError, ValueError
        As of :func:`select_blocks`; or n differs from the vectors', m or the names from the gradients', or a vector lacks a block.

    Notes
    -----
    Source: aTLAS, arXiv 2407.02880, on memory budgets; which block goes where is inferred, as the official code has none of it.
    """
    named = by_id(task_vectors)
    chosen = select_blocks(block_grads, budget, by=by, seed=seed)
    listed = _column_names(block_grads, names)
    if block_grads.shape != (len(named), len(listed)):
        expected = f"[{len(named)}, {len(listed)}], a row for each task vector and a column for each block"
        raise ValueError(f"block_grads: expected shape {expected}, got {tuple(block_grads.shape)}")
    for key, vector in named.items():
        absent = [name for name in listed if name not in vector]
        if absent:
            raise ValueError(f"task_vectors: {key}: lacks {shown(absent)}")
    vectors, regime = list(named.values()), _common_regime(named)
    return [
        TaskVector.from_deltas({name: vectors[task][name] for name, task in zip(listed, row, strict=True)}, regime=regime)
        for row in chosen.tolist()
    ]
