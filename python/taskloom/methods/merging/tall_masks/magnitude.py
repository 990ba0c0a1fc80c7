"""The baseline of the paper: masks of each task's largest changes."""

from __future__ import annotations

from collections.abc import Mapping

from taskloom.archive.packed import PackedMask
from taskloom.archive.states import Weights, read_states
from taskloom.archive.tasks import whole_model_masks


def magnitude_masks(base: Weights, finetuned: Mapping[str, Weights], share: float = 0.1) -> dict[str, PackedMask]:
    """Every task's mask by magnitude masking: the largest ``share`` of its changes over the whole model.

    Parameters
    ----------
    base, finetuned
        As in :func:`multi_task_vector`.
    share
        Above 0 and at most 1; ``int(share * P)`` of P entries and at least one. Default 0.1.

    Returns
    -------
    dict[str, PackedMask]
        By task; :func:`restore_task` applies one to the sum of the tasks' changes.

    Raises
    ------
    TypeError, ValueError, KeyError
        As :func:`multi_task_vector`.

    Notes
    -----
    Source: the baseline "magnitude masking" of TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0 and at most 1, got {share}")
    states = read_states(base, finetuned)
    found = whole_model_masks(states, share)
    shapes = {name: states.base[name].shape for name in states.names}
    return {
        task: PackedMask({name: found[states.tied.get(name, name)][place] for name in states.names}, shapes)
        for place, task in enumerate(states.tasks)
    }
