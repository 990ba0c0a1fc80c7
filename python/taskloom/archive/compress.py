"""Makes an archive: one streaming pass over the base and its fine-tunings, after those that a trim needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import taskloom
from taskloom.archive.format import INDEX, REPORT, base_name, mask_name, vector_name
from taskloom.archive.pieces import Buffers, Piece, Progress, Reader, Writer, count_pieces, cut_pieces, run_pieces
from taskloom.archive.planned import PlannedArchive, plan_archive
from taskloom.archive.recipe import pinned_recipe
from taskloom.archive.report import CompressReport, Measured, build_report
from taskloom.archive.restore import restore_values, square_sum
from taskloom.archive.vector import SumVector, TiesVector, check_finite, read_piece
from taskloom.merge.errors import CheckpointError, MergeError
from taskloom.merge.execute import thread_count
from taskloom.merge.header import FLOATING, TensorEntry
from taskloom.merge.output import RECIPE, check_output, copy_side_files, write_json
from taskloom.merge.plan import TensorTarget
from taskloom.merge.working import working_folder

_COPY = 1 << 20


def copy_tensor(reader: Reader, entry: TensorEntry, writer: Writer, target: TensorTarget, progress: Progress) -> None:
    """Copy a tensor of any dtype byte by byte."""
    for begin in range(0, entry.nbytes, _COPY):
        read = reader.read_bytes(entry, begin, min(_COPY, entry.nbytes - begin))
        writer.write(target, begin, read)
        progress.add(2 * len(read))


def _check_buffers(planned: PlannedArchive, reader: Reader) -> None:
    """Refuse a task whose integer (or otherwise unmasked) tensor is not the base's, bit for bit."""
    shared = {tensor.name for tensor in planned.shared}
    for model in planned.cast.tasks:
        for name, own in model.tensors.items():
            known = planned.cast.reference.tensors.get(name)
            if known is None or name in shared or known.dtype in FLOATING:
                continue
            for begin in range(0, known.nbytes, _COPY):
                count = min(_COPY, known.nbytes - begin)
                if not torch.equal(reader.read_bytes(known, begin, count), reader.read_bytes(own, begin, count, slot=1)):
                    raise CheckpointError(
                        f"model {model.label!r}: {known.dtype} tensor {name!r} differs from the base's; only floating-point tensors "
                        "have masks, so it could not be restored"
                    )


class _Build:
    """Writes vector, masks and the base's shared tensors piece by piece, and measures them."""

    def __init__(self, planned: PlannedArchive, reader: Reader, writer: Writer, vector: SumVector | TiesVector, progress: Progress) -> None:
        self._planned, self._reader, self._writer, self._vector, self._progress = planned, reader, writer, vector, progress
        self._buffers = Buffers()
        shape = (count_pieces([tensor.base.numel for tensor in planned.shared]), len(planned.info.tasks))
        self.ones = np.zeros(shape, dtype=np.int64)
        self.errors, self.norms = np.zeros(shape), np.zeros(shape)

    def _accumulated(self, values: Tensor, dtype: torch.dtype, slot: int) -> Tensor:
        return self._buffers.take(values.numel(), dtype, slot).copy_(values)

    def _target(self, name: str) -> TensorTarget:
        return self._planned.layout.targets[name]

    def __call__(self, piece: Piece) -> None:
        tensor = self._planned.shared[piece.tensor]
        base, tuned = read_piece(self._reader, tensor, piece)
        vector = self._vector.piece(piece, base, tuned)
        if not math.isfinite(float(vector.sum())) and not torch.isfinite(vector).all():
            check_finite(self._planned, piece, base, tuned)
            raise CheckpointError(f"tensor {tensor.name!r}: the sum of the tasks' differences from the base overflows")
        self._writer.write(self._target(base_name(tensor.name)), piece.begin * base.element_size(), base)
        self._writer.write(self._target(vector_name(tensor.name)), piece.begin * vector.element_size(), vector)
        origin = self._accumulated(base, vector.dtype, 0)
        written = base.nbytes + vector.nbytes
        for number, values in enumerate(tuned):
            written += self._mask(piece, number, base, values, vector, origin)
        self._progress.add(base.nbytes + sum(values.nbytes for values in tuned) + written)

    def _mask(self, piece: Piece, number: int, base: Tensor, tuned: Tensor, vector: Tensor, origin: Tensor) -> int:
        tensor, task = self._planned.shared[piece.tensor], self._planned.info.tasks[number]
        packed = taskloom.task_mask(base, tuned, vector, task.tall_mask_lambda)
        self._writer.write(self._target(mask_name(task.name, tensor.name)), piece.begin // 8, packed)
        restored = restore_values(base, packed, vector, tuned.dtype)
        own = self._accumulated(tuned, vector.dtype, 1)
        error = square_sum(self._accumulated(restored, vector.dtype, 2).sub_(own))
        if not math.isfinite(error):
            raise CheckpointError(f"model {task.model!r}: tensor {tensor.name!r}: base + vector overflows {tuned.dtype}")
        self.ones[piece.index, number] = int(taskloom.mask_count([packed], piece.count, 1)[1][1])
        self.errors[piece.index, number] = error
        self.norms[piece.index, number] = square_sum(own.sub_(origin))
        return packed.nbytes


def _stream(planned: PlannedArchive, reader: Reader, folder: Path, threads: int, progress: Progress) -> Measured:
    start = time.perf_counter()
    sizes = [tensor.base.numel for tensor in planned.shared]
    vector = TiesVector(planned, reader, threads, progress) if planned.info.vector == "ties" else SumVector()
    with Writer(planned.layout, folder) as writer:
        for copied in planned.copied:
            copy_tensor(reader, copied.reference, writer, planned.layout.targets[base_name(copied.name)], progress)
        build = _Build(planned, reader, writer, vector, progress)
        run_pieces(cut_pieces(sizes), build, threads, progress.tell)
    for model in planned.cast.models:
        for identity in model.files:
            identity.check_unchanged()
    progress.tell()
    return Measured(
        ones=[int(column.sum()) for column in build.ones.T],
        errors=[math.fsum(column) for column in build.errors.T],
        norms=[math.fsum(column) for column in build.norms.T],
        seconds=time.perf_counter() - start,
    )


def run_compression(
    planned: PlannedArchive,
    out: str | Path,
    *,
    threads: int = 0,
    copy_tokenizer: bool = True,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> CompressReport:
    """Carry out a planned compression; the arguments are those of :func:`compress_checkpoints`."""
    if threads < 0:
        raise MergeError(f"threads: expected 0 (all cores) or more, got {threads}")
    target = check_output(Path(out), planned.cast.models, overwrite=overwrite)
    with Reader() as reader:
        _check_buffers(planned, reader)
        with working_folder(target, overwrite=overwrite) as folder:
            measured = _stream(planned, reader, folder, thread_count(threads), Progress(progress))
            notes = copy_side_files(planned.cast.reference, folder, dtype=None, copy_tokenizer=copy_tokenizer)
            report = build_report(planned, target, measured, tuple(notes))
            report.write(folder / REPORT)
            (folder / RECIPE).write_text(pinned_recipe(planned.recipe, planned.cast, planned.compression), encoding="utf-8")
            write_index(planned.layout.weight_map, planned.layout.total_size, folder / INDEX)
    return report


def write_index(weight_map: Mapping[str, str], total_size: int, path: Path) -> None:
    """Write the index of shards; of a single file there is none."""
    if weight_map:
        write_json(path, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def compress_checkpoints(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    threads: int = 0,
    shard_size: str | int = "5GB",
    copy_tokenizer: bool = True,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> CompressReport:
    """Compress fine-tunings of one base into a TALL-mask archive: the base, one shared vector, and one bit per entry and task.

    Parameters
    ----------
    recipe
        Path of a YAML recipe with ``merge_method: tall_masks``, or the same content as a mapping (docs/compress.md).
    out
        Folder to write; must not exist or be empty. It appears only when the archive is complete and on the disk.
    threads
        Threads; 0 means all cores. The archive does not depend on it.
    shard_size
        Most bytes of tensors in one file, such as ``"5GB"``, ``"500M"`` or ``"1GiB"``.
    copy_tokenizer
        Copy the base's tokenizer files.
    overwrite
        Replace an existing ``out`` when the archive is complete.
    progress
        Called now and then, and at the end, with the number of tensor bytes read and written so far.

    Returns
    -------
    CompressReport
        Also written as ``out/compress_report.json``.

    Raises
    ------
    MergeError
        Its sub-classes say where: RecipeError, CheckpointError (a model that is missing, damaged, does not fit the base, holds NaN or
        infinity, or has an integer tensor that is not the base's), OutputError.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, section 3. Masks, vector and restored values are computed in float32
    (float64 where a tensor is float64).
    """
    planned = plan_archive(recipe, shard_size=shard_size)
    return run_compression(planned, out, threads=threads, copy_tokenizer=copy_tokenizer, overwrite=overwrite, progress=progress)
