"""TALL-mask compression of fine-tuned checkpoints: base, one multi-task vector, and one bit per entry and task.

Source: "Localizing Task Information for Improved Model Merging and Compression", Wang et al., ICML 2024 (arXiv 2405.07813).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

import taskloom
from taskloom.methods.merging.projected_digits import State

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class TallCompression:
    """What was stored, and in how many bytes.

    Attributes
    ----------
    thresholds
        lambda of each task, picked by validation accuracy.
    kept
        Share of ones in each task's mask.
    base_bytes, vector_bytes, mask_bytes
        Sizes of the files: the base checkpoint, the multi-task vector, the packed masks of all tasks.
    separate_bytes
        Size of the fine-tuned checkpoints that these three files replace.
    """

    thresholds: list[float]
    kept: list[float]
    base_bytes: int
    vector_bytes: int
    mask_bytes: int
    separate_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything that restoring any task needs."""
        return self.base_bytes + self.vector_bytes + self.mask_bytes

    @property
    def ratio(self) -> float:
        """Stored bytes as a share of the separate checkpoints'."""
        return self.stored_bytes / self.separate_bytes


def multi_task_vector(base: State, tuned: Sequence[State]) -> State:
    """Sum of the task vectors, with coefficient 1."""
    return {name: taskloom.multi_task_vector(origin, [state[name] for state in tuned]) for name, origin in base.items()}


def build_masks(base: State, tuned: State, vector: State, threshold: float) -> State:
    """Packed mask of every tensor of one task."""
    return {name: taskloom.task_mask(origin, tuned[name], vector[name], threshold) for name, origin in base.items()}


def restore(base: State, vector: State, masks: State) -> State:
    """The state dict that base, multi-task vector and a task's masks stand for."""
    return {name: taskloom.masked_update(origin, masks[name], vector[name]) for name, origin in base.items()}


def select_threshold(base: State, tuned: State, vector: State, accuracy: Callable[[State], float]) -> float:
    """The lambda of :data:`THRESHOLDS` whose restored model is the most accurate; the smallest of those that tie."""
    scores = [accuracy(restore(base, vector, build_masks(base, tuned, vector, threshold))) for threshold in THRESHOLDS]
    return THRESHOLDS[scores.index(max(scores))]


def _share_of_ones(masks: State, base: State) -> float:
    ones = sum(int(taskloom.mask_count([mask], base[name].numel(), 1)[1][1]) for name, mask in masks.items())
    return ones / sum(origin.numel() for origin in base.values())


def compress(models: Path, names: Sequence[str], out: Path, validate: Callable[[int, State], float]) -> TallCompression:
    """Write the multi-task vector and every task's masks of checkpoints on disk.

    Parameters
    ----------
    models
        Folder with ``base/model.safetensors`` and the same under each of ``names``, all float32.
    names
        The tasks' folders.
    out
        Folder to create; gets ``vector.safetensors`` and ``masks.safetensors`` (tensors named ``task/tensor``).
    validate
        Validation accuracy of a state dict on a task, by its number.
    """
    files = {name: models / name / "model.safetensors" for name in ("base", *names)}
    base = load_file(files["base"])
    tuned = [load_file(files[name]) for name in names]
    vector = multi_task_vector(base, tuned)
    thresholds, masks = [], []
    for task, state in enumerate(tuned):
        thresholds.append(select_threshold(base, state, vector, partial(validate, task)))
        masks.append(build_masks(base, state, vector, thresholds[-1]))
    out.mkdir(parents=True)
    save_file(vector, out / "vector.safetensors")
    packed = {f"{name}/{key}": bits for name, own in zip(names, masks, strict=True) for key, bits in own.items()}
    save_file(packed, out / "masks.safetensors")
    return TallCompression(
        thresholds=thresholds,
        kept=[_share_of_ones(own, base) for own in masks],
        base_bytes=files["base"].stat().st_size,
        vector_bytes=(out / "vector.safetensors").stat().st_size,
        mask_bytes=(out / "masks.safetensors").stat().st_size,
        separate_bytes=sum(files[name].stat().st_size for name in names),
    )


def load_restored(base: Path, folder: Path, task: str) -> State:
    """One task's state dict, from the base's file and what :func:`compress` wrote into ``folder``."""
    prefix = f"{task}/"
    stored = load_file(folder / "masks.safetensors")
    masks = {key.removeprefix(prefix): bits for key, bits in stored.items() if key.startswith(prefix)}
    return restore(load_file(base), load_file(folder / "vector.safetensors"), masks)
