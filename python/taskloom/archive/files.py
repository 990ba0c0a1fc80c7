"""An archive's way from files into memory, and from memory into files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from taskloom.archive.compress import write_index
from taskloom.archive.format import INDEX, STEM, base_name, mask_name, vector_name
from taskloom.archive.memory import TallArchive
from taskloom.archive.opened import OpenedArchive
from taskloom.archive.packed import PackedMask
from taskloom.archive.pieces import CODES, Reader, Writer
from taskloom.archive.planned import archive_tensors
from taskloom.merge.errors import CheckpointError
from taskloom.merge.output import check_output
from taskloom.merge.shards import PlannedTensor, lay_out, parse_size
from taskloom.merge.working import working_folder


def load_archive(opened: OpenedArchive) -> TallArchive:
    """Read an opened archive into memory; raises CheckpointError if a file cannot be read or is damaged."""
    stored, entries = opened.checkpoint.tensors, opened.tensors()
    shared = [name for name in entries if opened.has_mask(name)]
    shapes = {name: entries[name].shape for name in shared}
    with Reader() as reader:
        base = {name: reader.read_whole(entry, name) for name, entry in entries.items()}
        vector = {name: reader.read_whole(stored[vector_name(name)], name) for name in shared}
        masks = {}
        for task in opened.tasks:
            bits = {name: reader.read_whole(stored[mask_name(task, name)], name) for name in shared}
            try:
                masks[task] = PackedMask(bits, shapes)
            except ValueError as error:
                raise CheckpointError(f"{opened.path}: mask of task {task!r} is damaged: {error}") from error
    opened.check_unchanged()
    try:
        return TallArchive(opened.info, base, vector, masks)
    except ValueError as error:
        raise CheckpointError(f"{opened.path}: is damaged: {error}") from error


def described(values: Tensor, name: str) -> PlannedTensor:
    """A tensor as safetensors has it.

    Raises
    ------
    TypeError
        If the format has no such dtype.
    """
    if values.dtype not in CODES:
        raise TypeError(f"tensor {name!r} is {values.dtype}, which a safetensors file cannot hold")
    return PlannedTensor(name, CODES[values.dtype], tuple(values.shape))


def save_archive(archive: TallArchive, path: str | Path, *, shard_size: str | int, overwrite: bool) -> Path:
    """Write an archive's folder; the arguments are those of :meth:`TallArchive.save`."""
    limit = parse_size(shard_size)
    target = check_output(Path(path), [], overwrite=overwrite)
    names = sorted(archive.vector)
    base = [described(values, name) for name, values in archive.base.items()]
    shared = [described(archive.vector[name], name) for name in names]
    layout = lay_out(archive_tensors(base, shared, archive.tasks), limit, stem=STEM, metadata=archive.info.to_metadata())
    content = {base_name(name): values for name, values in archive.base.items()}
    content |= {vector_name(name): archive.vector[name] for name in names}
    for task, mask in archive.masks.items():
        content |= {mask_name(task, name): mask.bits[name] for name in names}
    with working_folder(target, overwrite=overwrite) as folder:
        with Writer(layout, folder) as writer:
            for name, values in content.items():
                writer.write(layout.targets[name], 0, values.cpu().contiguous().reshape(-1).view(torch.uint8))
        write_index(layout.weight_map, layout.total_size, folder / INDEX)
    return target
