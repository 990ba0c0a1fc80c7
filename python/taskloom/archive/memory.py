"""An archive in memory: builds it from models, restores its tasks, and switches a live module between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from taskloom.archive.describe import info_of
from taskloom.archive.format import ArchivedTask, ArchiveInfo, why_no_task_name
from taskloom.archive.live import module_tensors, write_
from taskloom.archive.opened import open_archive
from taskloom.archive.packed import PackedMask
from taskloom.archive.pieces import TORCH_DTYPES
from taskloom.archive.select import LAMBDA_GRID, select_lambdas
from taskloom.archive.states import Weights, is_finite, read_states, thresholds_of
from taskloom.archive.tasks import DEFAULT_LAMBDA, DEFAULT_TRIM, VectorKind, masks_of, restored_tensor, vector_of
from taskloom.merge.errors import near_miss


class TallArchive:
    """Fine-tunings of one base in memory, as the base, one vector that they share, and one bit for each entry and task.

    :meth:`build` makes it of models, :meth:`load` reads what ``taskloom compress`` or :meth:`save` wrote.

    Parameters
    ----------
    info
        What it says about itself.
    base
        All tensors of the base; the archive keeps these very tensors.
    vector
        The shared vector, float32 or float64.
    masks
        By task, in the order of ``info.tasks``; their tensors are the vector's.

    Raises
    ------
    ValueError
        If the parts do not fit each other, or the vector is not finite.
    """

    def __init__(
        self, info: ArchiveInfo, base: Mapping[str, Tensor], vector: Mapping[str, Tensor], masks: Mapping[str, PackedMask]
    ) -> None:
        self.info = info
        self._base, self._vector, self._masks = dict(base), dict(vector), dict(masks)
        if list(masks) != [task.name for task in info.tasks]:
            raise ValueError(f"TallArchive: masks: expected those of {[task.name for task in info.tasks]}, got {list(masks)}")
        for name, values in self._vector.items():
            if name not in self._base or self._base[name].shape != values.shape:
                raise ValueError(f"TallArchive: vector: {name!r}: expected a tensor of the base and its shape, got {tuple(values.shape)}")
            if not is_finite(values) or not is_finite(self._base[name]):
                raise ValueError(f"TallArchive: tensor {name!r} holds NaN or infinity")
        for task, mask in self._masks.items():
            if dict(mask.shapes) != {name: values.shape for name, values in self._vector.items()}:
                raise ValueError(f"TallArchive: masks: task {task!r}: expected the vector's tensors and shapes")

    @classmethod
    def build(
        cls,
        base: Weights,
        finetuned: Mapping[str, Weights],
        *,
        method: VectorKind = "sum",
        trim: float = DEFAULT_TRIM,
        tall_mask_lambda: float | Mapping[str, float] | None = None,
        evaluate: Callable[[str, dict[str, Tensor]], float] | None = None,
        grid: Sequence[float] = LAMBDA_GRID,
    ) -> TallArchive:
        """Compress fine-tunings of a base.

        Parameters
        ----------
        base, finetuned, method, trim
            As in :func:`multi_task_vector`. Everything is copied.
        tall_mask_lambda
            As in :func:`tall_masks`. Default: picked by ``evaluate``, or 0.4 without it.
        evaluate
            Validation score of a task's weights, higher is better; as in :func:`select_lambda`.
        grid
            What ``evaluate`` picks from.

        Raises
        ------
        TypeError, ValueError, KeyError
            As :func:`tall_masks` and :func:`select_lambda`; ValueError too if a task has a name that cannot be stored or values too large
            for float16, or both a threshold and ``evaluate`` are given.
        """
        for task in finetuned:
            wrong = why_no_task_name(task) if isinstance(task, str) else "must be text"
            if wrong is not None:
                raise ValueError(f"finetuned: task name {task!r} {wrong}")
        if evaluate is not None and tall_mask_lambda is not None:
            raise ValueError("tall_mask_lambda: expected none beside evaluate, which picks it")
        states = read_states(base, finetuned)
        vector = vector_of(states, method, trim, [1.0] * len(states.tasks))
        if evaluate is not None:
            thresholds = list(select_lambdas(states, vector, evaluate, grid).values())
        else:
            thresholds = thresholds_of(DEFAULT_LAMBDA if tall_mask_lambda is None else tall_mask_lambda, states.tasks)
        masks = {task: masks_of(states, vector, task, threshold) for task, threshold in zip(states.tasks, thresholds, strict=True)}
        info = info_of(states, method, trim, thresholds)
        copied = {name: values.clone(memory_format=torch.contiguous_format) for name, values in states.base.items()}
        archive = cls(info, copied, vector, masks)
        for archived in info.tasks:
            for name in vector:
                if archive._dtype(archived, name) == torch.float16:
                    # Its range is small enough for the sum of the tasks' changes to leave it.
                    archive._restored(archived, name)
        return archive

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self._masks)

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The base's tensors."""
        return MappingProxyType(self._base)

    @property
    def vector(self) -> Mapping[str, Tensor]:
        """The shared vector, by the names of the tensors that have masks."""
        return MappingProxyType(self._vector)

    @property
    def masks(self) -> Mapping[str, PackedMask]:
        """Each task's mask."""
        return MappingProxyType(self._masks)

    @property
    def nbytes(self) -> int:
        """Bytes of base, vector and masks."""
        tensors = (*self._base.values(), *self._vector.values())
        return sum(values.nbytes for values in tensors) + sum(mask.nbytes for mask in self._masks.values())

    def __repr__(self) -> str:
        return f"TallArchive({len(self.tasks)} tasks, {self.info.parameters} parameters, vector {self.info.vector!r}, {self.nbytes} bytes)"

    def _task(self, name: str) -> ArchivedTask:
        for task in self.info.tasks:
            if task.name == name:
                return task
        raise KeyError(f"TallArchive: has no task {name!r}; its tasks are {', '.join(self.tasks)}{near_miss(str(name), self.tasks)}")

    def state_dict(self, task: str) -> dict[str, Tensor]:
        """A task's restored weights, each in the task's dtype and in fresh memory.

        Raises
        ------
        KeyError
            If there is no such task.
        ValueError
            If a value is too large for its dtype.
        """
        found = self._task(task)
        return {name: self._restored(found, name) if name in self._vector else values.clone() for name, values in self._base.items()}

    def _dtype(self, task: ArchivedTask, name: str) -> torch.dtype:
        return TORCH_DTYPES[task.dtypes[name]] if name in task.dtypes else self._base[name].dtype

    def _restored(self, task: ArchivedTask, name: str) -> Tensor:
        bits = self._masks[task.name].bits[name]
        return restored_tensor(name, self._base[name], bits, self._vector[name], self._dtype(task, name))

    def apply_(self, module: nn.Module, task: str) -> nn.Module:
        """Give a module the weights of a task, in place and in one pass over them.

        Every entry is written, whatever the module held before, so nothing that was done to it meanwhile remains, and from A to B and
        back to A restores every bit.

        Parameters
        ----------
        module
            Has the base's tensors under the same names and shapes, on the archive's device; floating-point ones in any of its dtypes. What
            it has besides, such as heads, stays as it is.
        task
            The task.

        Returns
        -------
        nn.Module
            The module. Values are computed in the vector's dtype (float64 in a float64 module) and rounded once to the module's.

        Raises
        ------
        KeyError
            If there is no such task, or the module lacks a tensor.
        ValueError
            If a tensor has another shape, lies on another device, repeats elements, is the archive's own memory, is tied to one that the
            task has other values of, or is float16 where the task has values too large for it.
        TypeError
            If it is no module, or a tensor is not floating point where the base's is, or of another dtype where the base's is not. After
            any of these errors the module is as it was.
        """
        self._task(task)
        mask = self._masks[task].bits
        write_(module_tensors(module, self._base, self._vector, mask), self._base, self._vector, mask)
        return module

    def to(self, device: torch.device | str) -> TallArchive:
        """The archive on a device, to switch modules there."""
        base, vector = ({name: values.to(device) for name, values in part.items()} for part in (self._base, self._vector))
        return TallArchive(self.info, base, vector, {task: mask.to(device) for task, mask in self._masks.items()})

    def save(self, path: str | Path, *, shard_size: str | int = "5GB", overwrite: bool = False) -> Path:
        """Write the archive as ``taskloom compress`` does; ``taskloom extract`` and :meth:`load` read it.

        Parameters
        ----------
        path
            Folder to write; must not exist or be empty. It appears only when the archive is complete and on the disk.
        shard_size
            Most bytes of tensors in one file, such as ``"5GB"``, ``"500M"`` or ``"1GiB"``.
        overwrite
            Replace an existing folder when the archive is complete.

        Returns
        -------
        Path
            The folder's absolute path.

        Raises
        ------
        MergeError
            OutputError if the folder may not or cannot be written.
        TypeError
            If a tensor of the base has a dtype that safetensors files lack.
        """
        from taskloom.archive.files import save_archive

        return save_archive(self, path, shard_size=shard_size, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> TallArchive:
        """Read an archive's folder, file, or Hugging Face id into memory.

        Raises
        ------
        CheckpointError
            If it cannot be found or read, is no archive, or is damaged; where its parts do not fit each other it is a ValueError too.
        """
        return open_archive(path).load()
