"""Restores one task of an archive: ``base + mask * vector`` with the coefficient 1, in each tensor's own dtype."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taskloom.archive.compress import copy_tensor, write_index
from taskloom.archive.format import ArchivedTask, mask_bytes, mask_name, vector_name
from taskloom.archive.opened import OpenedArchive, open_archive
from taskloom.archive.pieces import TORCH_DTYPES, Piece, Progress, Reader, Writer, cut_pieces, run_pieces
from taskloom.archive.restore import restore_values
from taskloom.merge.errors import CheckpointError, MergeError
from taskloom.merge.execute import thread_count
from taskloom.merge.header import TensorEntry
from taskloom.merge.output import INDEX, check_output, copy_side_files
from taskloom.merge.report import taskloom_version
from taskloom.merge.shards import Layout, PlannedTensor, lay_out, parse_size
from taskloom.merge.working import working_folder


@dataclass(frozen=True)
class ExtractReport:
    """A restored task.

    Attributes
    ----------
    archive, task, model, output
        Where it came from, what it is, the model it was, and the folder it is in.
    tall_mask_lambda
        Threshold of its masks.
    tensors, copied
        Number of tensors restored with a mask, and of those that are the base's.
    files
        Name and bytes of each safetensors file.
    seconds, bytes_read, bytes_written
        Wall time of reading, computing and writing, and bytes of tensors.
    notes
        What was copied or left out.
    taskloom
        Version that wrote it.
    """

    archive: str
    task: str
    model: str
    output: str
    tall_mask_lambda: float
    tensors: int
    copied: int
    files: list[dict[str, Any]]
    seconds: float
    bytes_read: int
    bytes_written: int
    notes: list[str]
    taskloom: str

    def to_dict(self) -> dict[str, Any]:
        """The report as plain types."""
        return asdict(self)


@dataclass(frozen=True)
class _Part:
    """A tensor to restore: its entries in the archive and its dtype in the task."""

    name: str
    base: TensorEntry
    vector: TensorEntry
    mask: TensorEntry
    dtype: str


def _parts(archive: OpenedArchive, task: ArchivedTask) -> list[_Part]:
    tensors = archive.checkpoint.tensors
    return [
        _Part(name, base, tensors[vector_name(name)], tensors[mask_name(task.name, name)], task.dtypes.get(name, base.dtype))
        for name, base in archive.tensors().items()
        if archive.has_mask(name)
    ]


def _check_tails(parts: Iterable[_Part], reader: Reader) -> None:
    """The bits after a mask's last entry are zero; others would be a sign of damage, and counts of bits rely on it."""
    for part in parts:
        used = part.base.numel % 8
        if used and int(reader.read_bytes(part.mask, part.mask.nbytes - 1, 1)[0]) >> used:
            raise CheckpointError(f"{part.mask.file}: mask of tensor {part.name!r} is damaged: bits after its last entry are set")


def _restore_piece(reader: Reader, part: _Part, piece: Piece) -> tuple[Tensor, int]:
    """The restored values of a piece, and how many bytes were read for them."""
    base, vector = reader.read(part.base, piece), reader.read(part.vector, piece, slot=1)
    packed = reader.read_bytes(part.mask, piece.begin // 8, mask_bytes(piece.count), slot=2)
    restored = restore_values(base, packed, vector, TORCH_DTYPES[part.dtype])
    if not math.isfinite(float(restored.sum(dtype=vector.dtype))) and not torch.isfinite(restored).all():
        raise CheckpointError(f"{part.vector.file}: tensor {part.name!r} is restored with NaN or infinity: the archive is damaged")
    return restored, base.nbytes + vector.nbytes + packed.nbytes


def default_output(archive: OpenedArchive, task: str) -> Path:
    """Where a task goes that is given no place: ``ARCHIVE-TASK`` beside the archive."""
    path = archive.path.absolute()
    return path.with_name(f"{path.name.removesuffix('.safetensors')}-{task}")


def _layout(archive: OpenedArchive, task: ArchivedTask, limit: int) -> Layout:
    shared = {name: task.dtypes.get(name) for name in archive.tensors() if archive.has_mask(name)}
    planned = [PlannedTensor(name, shared.get(name) or entry.dtype, entry.shape) for name, entry in archive.tensors().items()]
    return lay_out(planned, limit)


def _config_dtype(parts: Iterable[_Part]) -> str | None:
    """What config.json is to say: the task's dtype where that is one and not the base's."""
    dtypes, of_base = {part.dtype for part in parts}, {part.base.dtype for part in parts}
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes != of_base else None


@dataclass(frozen=True)
class PlannedExtraction:
    """A task and the layout of its checkpoint; ``progress_total`` is what the count of bytes reaches."""

    archive: OpenedArchive
    task: ArchivedTask
    parts: tuple[_Part, ...]
    copied: tuple[tuple[str, TensorEntry], ...]
    layout: Layout

    @property
    def bytes_in(self) -> int:
        """Bytes that are read."""
        shared = sum(part.base.nbytes + part.vector.nbytes + part.mask.nbytes for part in self.parts)
        return shared + sum(entry.nbytes for _, entry in self.copied)

    @property
    def progress_total(self) -> int:
        """Bytes read and written together."""
        return self.bytes_in + self.layout.total_size


def plan_extraction(archive: str | Path | OpenedArchive, task: str, *, shard_size: str | int = "5GB") -> PlannedExtraction:
    """Open an archive and lay a task's checkpoint out, writing nothing.

    Raises
    ------
    MergeError
        If the archive is damaged or has no such task, or the shard size is none.
    """
    limit = parse_size(shard_size)
    opened = archive if isinstance(archive, OpenedArchive) else open_archive(archive)
    found = opened.task(task)
    copied = tuple((name, entry) for name, entry in opened.tensors().items() if not opened.has_mask(name))
    return PlannedExtraction(opened, found, tuple(_parts(opened, found)), copied, _layout(opened, found, limit))


def run_extraction(
    planned: PlannedExtraction,
    out: str | Path | None = None,
    *,
    threads: int = 0,
    copy_tokenizer: bool = True,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ExtractReport:
    """Carry out a planned extraction; the arguments are those of :func:`extract_task`."""
    if threads < 0:
        raise MergeError(f"threads: expected 0 (all cores) or more, got {threads}")
    archive, parts, layout = planned.archive, planned.parts, planned.layout
    chosen = default_output(archive, planned.task.name) if out is None else Path(out)
    target = check_output(chosen, [archive.checkpoint], overwrite=overwrite)
    counter = Progress(progress)
    start = time.perf_counter()
    with Reader() as reader:
        _check_tails(parts, reader)
        with working_folder(target, overwrite=overwrite) as folder:
            with Writer(layout, folder) as writer:
                for name, entry in planned.copied:
                    copy_tensor(reader, entry, writer, layout.targets[name], counter)

                def restore(piece: Piece) -> None:
                    part = parts[piece.tensor]
                    restored, read = _restore_piece(reader, part, piece)
                    writer.write(layout.targets[part.name], piece.begin * restored.element_size(), restored)
                    counter.add(read + restored.nbytes)

                run_pieces(cut_pieces([part.base.numel for part in parts]), restore, thread_count(threads), counter.tell)
            archive.check_unchanged()
            counter.tell()
            seconds = time.perf_counter() - start
            notes = copy_side_files(archive.checkpoint, folder, dtype=_config_dtype(parts), copy_tokenizer=copy_tokenizer)
            write_index(layout.weight_map, layout.total_size, folder / INDEX)
    return ExtractReport(
        archive=str(archive.path),
        task=planned.task.name,
        model=planned.task.model,
        output=str(target),
        tall_mask_lambda=planned.task.tall_mask_lambda,
        tensors=len(parts),
        copied=len(planned.copied),
        files=[{"name": file.name, "bytes": file.size} for file in layout.files],
        seconds=seconds,
        bytes_read=planned.bytes_in,
        bytes_written=layout.total_size,
        notes=notes,
        taskloom=taskloom_version(),
    )


def extract_task(
    archive: str | Path | OpenedArchive,
    task: str,
    out: str | Path | None = None,
    *,
    threads: int = 0,
    shard_size: str | int = "5GB",
    copy_tokenizer: bool = True,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ExtractReport:
    """Write one task's checkpoint out of an archive: ``base + mask * vector``, each tensor in the dtype that it had in the task.

    Parameters
    ----------
    archive
        A folder that :func:`compress_checkpoints` wrote, or one that is open already.
    task
        Name of the task.
    out
        Folder to write; must not exist or be empty. None: ``ARCHIVE-TASK`` beside the archive.
    threads
        Threads; 0 means all cores. The result does not depend on it.
    shard_size
        Most bytes of tensors in one file, such as ``"5GB"``, ``"500M"`` or ``"1GiB"``.
    copy_tokenizer
        Copy the tokenizer files that are in the archive.
    overwrite
        Replace an existing ``out`` when the checkpoint is complete.
    progress
        Called now and then, and at the end, with the number of tensor bytes read and written so far.

    Raises
    ------
    MergeError
        Its sub-classes say where: CheckpointError (the archive is missing, damaged, or has no such task), OutputError.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, section 3.
    """
    planned = plan_extraction(archive, task, shard_size=shard_size)
    return run_extraction(planned, out, threads=threads, copy_tokenizer=copy_tokenizer, overwrite=overwrite, progress=progress)


def read_masks(archive: OpenedArchive, task: ArchivedTask) -> dict[str, Tensor]:
    """A task's packed masks by tensor."""
    with Reader() as reader:
        masks = {part.name: reader.read_whole(part.mask, part.name) for part in _parts(archive, task)}
    archive.check_unchanged()
    return masks


def restored_state(archive: OpenedArchive, task: ArchivedTask) -> dict[str, Tensor]:
    """A task's weights by tensor, in memory."""
    state: dict[str, Tensor] = {}
    parts = {part.name: part for part in _parts(archive, task)}
    with Reader() as reader:
        _check_tails(parts.values(), reader)
        for name, entry in archive.tensors().items():
            if name not in parts:
                state[name] = reader.read_whole(entry, name)
                continue
            part = parts[name]
            whole = torch.empty(entry.numel, dtype=TORCH_DTYPES[part.dtype])
            for piece in cut_pieces([entry.numel]):
                whole[piece.begin : piece.begin + piece.count] = _restore_piece(reader, part, piece)[0]
            state[name] = whole.reshape(entry.shape)
    archive.check_unchanged()
    return state
