"""The tasks' shared vector, their masks, and what both restore, of tensors in memory.

The results are those of ``taskloom compress`` for the same models and settings, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

import taskloom
from taskloom._selection import band_ranks
from taskloom.archive.packed import PackedMask
from taskloom.archive.restore import restore_values
from taskloom.archive.states import TaskStates, Weights, is_finite, per_task, read_states, state_of, thresholds_of
from taskloom.merge.align import some
from taskloom.merge.task_vector import TaskVector
from taskloom.ops._checks import FLOATING

VectorKind = Literal["sum", "ties"]

DEFAULT_LAMBDA = 0.4
DEFAULT_TRIM = 0.2


def whole_model_masks(states: TaskStates, share: float) -> dict[str, list[Tensor]]:
    """Each task's largest changes over the whole model: packed masks by tensor, one a task.

    ``k = int(share * entries)`` and at least 1 are kept. Of equal magnitudes those of the lower index are, the tensors sorted by name.
    """
    names = states.ranked
    wide = {states.dtype(name) for name in names}
    if len(wide) > 1:
        raise ValueError("expected float64 in all tensors or in none where a trim ranks them together; method='sum' takes both")
    masks: dict[str, list[Tensor]] = {name: [] for name in names}
    rank = band_ranks(sum(states.base[name].numel() for name in names), share, at_least_one=True)[1]
    for task in states.tasks:
        deltas = [states.delta(task, name) for name in names]
        cuts = taskloom.split_threshold(taskloom.magnitude_threshold(deltas, rank=rank), deltas)
        for name, delta, cut in zip(names, deltas, cuts, strict=True):
            masks[name].append(taskloom.magnitude_mask(delta, threshold=cut, packed=True))
    return masks


def _ties_vector(states: TaskStates, trim: float, weights: list[float]) -> dict[str, Tensor]:
    """TIES without its mean: trim, elect, sum; a vote of exactly zero takes the sign elected more often in the whole model."""
    masks = whole_model_masks(states, trim)
    total = 0
    for name, own in masks.items():
        votes = taskloom.sparse_merge(None, states.deltas(name), weights, select="mask", masks=own)
        total += int(torch.count_nonzero(votes > 0)) - int(torch.count_nonzero(votes < 0))
    vector = {}
    for name, own in masks.items():
        deltas = states.deltas(name)
        if total < 0:
            # The election gives a zero vote to the positive entries; turned around, to the negative ones.
            deltas = [delta.neg_() for delta in deltas]
        summed = taskloom.sparse_merge(None, deltas, weights, select="mask", masks=own, elect="sign_sum", zero_sign="positive")
        # Adding zero turns a negative zero into a positive one.
        vector[name] = summed.neg_().add_(0.0) if total < 0 else summed
    return vector


def vector_of(states: TaskStates, method: VectorKind, trim: float, weights: list[float]) -> dict[str, Tensor]:
    """The tasks' shared vector, float32 (float64 where a tensor is), in the base's order.

    Raises
    ------
    ValueError
        If the method is unknown, the trim is no share, or a sum overflows.
    """
    if method not in ("sum", "ties"):
        raise ValueError(f"method: expected 'sum' or 'ties', got {method!r}")
    if not 0 < trim <= 1:
        raise ValueError(f"trim: expected a share above 0 and at most 1, got {trim}")
    found = _ties_vector(states, trim, weights) if method == "ties" else {}
    vector = {}
    for name in states.names:
        if method == "sum":
            vector[name] = taskloom.multi_task_vector(*states.pair(name), weights)
        else:
            vector[name] = found[states.tied.get(name, name)]
        if not is_finite(vector[name]):
            raise ValueError(f"tensor {name!r}: the sum of the tasks' differences from the base overflows")
    return vector


def masks_of(states: TaskStates, vector: Mapping[str, Tensor], task: str, threshold: float, weight: float = 1.0) -> PackedMask:
    """A task's TALL mask."""
    bits = {}
    for name in states.names:
        origin, tuned = states.base[name], states.tasks[task][name]
        if weight != 1.0 or isinstance(states.tasks[task], TaskVector):
            tuned = states.delta(task, name).mul_(weight)
            origin = torch.zeros_like(tuned)
        bits[name] = taskloom.task_mask(origin, tuned, vector[name], threshold)
    return PackedMask(bits, {name: states.base[name].shape for name in states.names})


def multi_task_vector(
    base: Weights,
    finetuned: Mapping[str, Weights],
    method: VectorKind = "sum",
    trim: float = DEFAULT_TRIM,
    *,
    weight: float | Mapping[str, float] = 1.0,
) -> dict[str, Tensor]:
    """One vector for all tasks: what their fine-tunings changed, summed.

    Parameters
    ----------
    base
        State dict or module.
    finetuned
        State dicts, modules or :class:`taskloom.TaskVector` by task, with the base's names and shapes.
    method
        ``"sum"``: the sum of the changes. ``"ties"``: of each task the largest ``trim`` of its changes over the whole model, of each entry
        those with the sign of their sum (where that is zero, the sign that is more frequent in the whole model), summed.
    trim
        With ``"ties"``: the share that is kept. Default 0.2.
    weight
        Factor of a task's changes, one for all or by task. Default 1: neither a mean nor scaled.

    Returns
    -------
    dict[str, Tensor]
        By tensor, in the base's order: float32 (float64 where a tensor is float64). Tensors that are not floating point are left out.

    Raises
    ------
    TypeError, ValueError, KeyError
        As :func:`taskloom.archive.states.read_states`; ValueError too if an argument is out of range or a sum overflows.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, section 3, and its official code for TIES ("dis-sum"; TIES merging itself,
    arXiv 2306.01708, takes the mean). Exactly ``int(trim * P)`` of P entries are kept, the official code keeps one more.
    """
    states = read_states(base, finetuned)
    return vector_of(states, method, trim, per_task("weight", weight, states.tasks))


def check_vector(states: TaskStates, tau: Mapping[str, Tensor]) -> None:
    """Refuse a vector that is not these states'.

    Raises
    ------
    TypeError, KeyError, ValueError
        If it names tensors that have no masks, lacks some, has another shape or dtype, or is not finite.
    """
    for name in tau:
        if name in states.base and name not in states.names:
            raise TypeError(f"tau: tensor {name!r} is {states.base[name].dtype}; only floating-point tensors that models store have masks")
    if tau.keys() != set(states.names):
        raise KeyError(f"tau: expected the tensors {some(list(states.names))}, got {some(list(tau))}")
    for name in states.names:
        own = tau[name]
        if own.shape != states.base[name].shape:
            raise ValueError(f"tau: {name!r}: expected shape {tuple(states.base[name].shape)}, got {tuple(own.shape)}")
        if own.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"tau: {name!r}: expected float32 or float64, got {own.dtype}; a sum of nearly cancelling terms needs them")
        if not is_finite(own):
            raise ValueError(f"tau: {name!r} holds NaN or infinity")


def tall_masks(
    base: Weights,
    finetuned: Mapping[str, Weights],
    tau: Mapping[str, Tensor],
    tall_mask_lambda: float | Mapping[str, float] = DEFAULT_LAMBDA,
) -> dict[str, PackedMask]:
    """Every task's mask: where its own change outweighs what the others add there, ``|d_t| > tall_mask_lambda * |tau - d_t|``.

    Parameters
    ----------
    base, finetuned
        As in :func:`multi_task_vector`.
    tau
        The vector that the masks will be applied to, of :func:`multi_task_vector`: masks of the sum lose accuracy on a TIES vector.
    tall_mask_lambda
        Above 0, one for all tasks or by task; smaller keeps more, 1 minimises the L1 distance to the task's weights. Default 0.4.

    Returns
    -------
    dict[str, PackedMask]
        By task.

    Raises
    ------
    TypeError
        As :func:`multi_task_vector`; if ``tau`` holds a tensor that is not floating point in the base (it is copied and has no mask), or
        one that is not float32 or float64.
    ValueError, KeyError
        As :func:`multi_task_vector`, or if ``tau`` does not fit the base or is not finite.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, equation 4. Compared in float32 (float64 where a tensor is float64).
    """
    states = read_states(base, finetuned)
    check_vector(states, tau)
    thresholds = thresholds_of(tall_mask_lambda, states.tasks)
    return {task: masks_of(states, tau, task, threshold) for task, threshold in zip(states.tasks, thresholds, strict=True)}


def restored_tensor(name: str, base: Tensor, bits: Tensor, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a task, in fresh memory.

    Raises
    ------
    ValueError
        If a value is too large for the dtype.
    """
    restored = restore_values(base, bits, vector, dtype)
    if not is_finite(restored):
        raise ValueError(f"tensor {name!r}: base + vector overflows {dtype}")
    return restored


def restore_task(base: Weights, tau: Mapping[str, Tensor], mask: PackedMask) -> dict[str, Tensor]:
    """A task's weights: ``base + mask * tau``, with the coefficient 1.

    Parameters
    ----------
    base
        State dict or module.
    tau, mask
        Of the same tensors.

    Returns
    -------
    dict[str, Tensor]
        In the base's order and dtypes, in fresh memory; computed in ``tau``'s dtype and rounded once. Tensors without a mask are the
        base's.

    Raises
    ------
    KeyError, ValueError
        If base, vector and mask do not fit each other; ValueError too if a value is too large for its dtype.
    """
    origin = state_of("base", base)
    if tau.keys() != mask.shapes.keys() or not tau.keys() <= origin.keys():
        raise KeyError(f"restore_task: expected tau and mask of the same tensors of the base, got {some(list(tau))} and {some(list(mask))}")
    restored = {}
    for name, values in origin.items():
        if name not in tau:
            restored[name] = values.clone()
            continue
        if values.dtype not in FLOATING or not values.shape == tau[name].shape == mask.shapes[name]:
            raise ValueError(f"restore_task: {name!r}: expected floating point of shape {tuple(mask.shapes[name])} in base and tau")
        restored[name] = restored_tensor(name, values, mask.bits[name], tau[name], values.dtype)
    return restored
