"""Consensus merging: one model without the entries that too few tasks need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import taskloom
from taskloom.archive.packed import PackedMask, check_same_tensors
from taskloom.archive.states import Weights, is_finite, per_task, read_states, thresholds_of
from taskloom.archive.tasks import DEFAULT_LAMBDA, DEFAULT_TRIM, VectorKind, masks_of, vector_of
from taskloom.merge.align import some

Masks = Mapping[str, PackedMask] | Sequence[PackedMask]


def _listed(masks: Masks) -> list[PackedMask]:
    found = list(masks.values()) if isinstance(masks, Mapping) else list(masks)
    if not found:
        raise ValueError("masks: expected at least one, got none")
    for mask in found:
        if not isinstance(mask, PackedMask):
            raise TypeError(f"masks: expected PackedMask, got {type(mask).__name__}")
    check_same_tensors(found)
    return found


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise ValueError(f"k: expected an integer >= 0, got {k!r}")


def consensus_mask(masks: Masks, k: int = 2) -> PackedMask:
    """The entries that at least ``k`` of the tasks' masks set.

    Parameters
    ----------
    masks
        Of :func:`tall_masks`, T of them.
    k
        0 sets every entry, 1 is the OR of the masks and drops what no task needs ("catastrophic" weights), 2 also what only one does
        ("selfish" ones), T is their AND, more than T sets none. Default 2.

    Raises
    ------
    ValueError
        If there is no mask, shapes differ, or ``k`` is no integer or negative.
    KeyError
        If the masks are of different tensors.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, section 4. Counted without unpacking
    (:func:`taskloom.mask_count`).
    """
    _check_k(k)
    found = _listed(masks)
    shapes = found[0].shapes
    agreeing = min(k, len(found) + 1)
    bits = {name: taskloom.mask_count([mask.bits[name] for mask in found], shape.numel(), agreeing)[0] for name, shape in shapes.items()}
    return PackedMask(bits, shapes)


def mask_profile(masks: Masks) -> Tensor:
    """How many entries are set in exactly 0, 1, ... T of the tasks' masks.

    Returns
    -------
    Tensor
        int64 [T + 1]; sums to the number of entries.

    Raises
    ------
    ValueError, KeyError
        As :func:`consensus_mask`.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, figure 4.
    """
    found = _listed(masks)
    profile = torch.zeros(len(found) + 1, dtype=torch.int64)
    for name, shape in found[0].shapes.items():
        profile += taskloom.mask_count([mask.bits[name] for mask in found], shape.numel(), 0)[1].cpu()
    return profile


def _check_fit(masks: Masks, tasks: Sequence[str], names: Sequence[str], base: Mapping[str, Tensor]) -> None:
    shapes = _listed(masks)[0].shapes
    if shapes.keys() != set(names):
        raise KeyError(f"masks: expected those of the base's tensors {some(list(names))}, got {some(list(shapes))}")
    for name in names:
        if shapes[name] != base[name].shape:
            raise ValueError(f"masks: {name!r}: expected shape {tuple(base[name].shape)}, got {tuple(shapes[name])}")
    if isinstance(masks, Mapping) and masks.keys() != set(tasks):
        raise KeyError(f"masks: expected those of the tasks {some(list(tasks))}, got {some(list(masks))}")
    if len(masks) != len(tasks):
        raise ValueError(f"masks: expected one for each of {len(tasks)} tasks, got {len(masks)}")


def merge_consensus(
    base: Weights,
    finetuned: Mapping[str, Weights],
    masks: Masks | None = None,
    *,
    k: int = 2,
    method: VectorKind = "sum",
    weight: float | Mapping[str, float] = 1.0,
    lambda_: float = 0.3,
    trim: float = DEFAULT_TRIM,
    tall_mask_lambda: float | Mapping[str, float] = DEFAULT_LAMBDA,
) -> dict[str, Tensor]:
    """Merge fine-tunings into one model: ``base + lambda_ * consensus * tau``.

    Parameters
    ----------
    base, finetuned, method, trim, weight
        As in :func:`multi_task_vector`.
    masks
        The tasks' masks, such as those picked on validation data; of the same vector (method, trim, weight). Default: made with
        ``tall_mask_lambda``, of weighted changes.
    k
        As in :func:`consensus_mask`; 0 is task arithmetic (``"sum"``) or TIES with a sum.
    lambda_
        Factor of the merged change (the paper's alpha). Default 0.3; the paper picks from 0.1, 0.2, ... 1.0 on validation data.
    tall_mask_lambda
        As in :func:`tall_masks`; not looked at where masks are given.

    Returns
    -------
    dict[str, Tensor]
        In the base's order and dtypes, in fresh memory. Tensors without a mask are the base's.

    Raises
    ------
    TypeError, ValueError, KeyError
        As :func:`tall_masks` and :func:`consensus_mask`; ValueError too if a merged value is too large for its dtype.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, section 4. Without ``masks`` it is ``merge_method: consensus_ta`` or
    ``consensus_ties`` of ``taskloom merge``, to the bit.
    """
    _check_k(k)
    states = read_states(base, finetuned)
    (scale,) = per_task("lambda_", lambda_, ["merged"])
    weights = per_task("weight", weight, states.tasks)
    vector = vector_of(states, method, trim, weights)
    if masks is None:
        thresholds = thresholds_of(tall_mask_lambda, states.tasks)
        settings = zip(states.tasks, thresholds, weights, strict=True)
        masks = [masks_of(states, vector, task, threshold, factor) for task, threshold, factor in settings]
    else:
        _check_fit(masks, list(states.tasks), states.names, states.base)
    agreed = consensus_mask(masks, k).bits
    merged = {}
    for name, values in states.base.items():
        merged[name] = taskloom.masked_update(values, agreed[name], vector[name], scale) if name in vector else values.clone()
        if name in vector and not is_finite(merged[name]):
            raise ValueError(f"tensor {name!r}: a merged value is too large for {values.dtype}")
    return merged
