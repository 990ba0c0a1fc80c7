"""What a planned merge will read, write and need: the content of ``--dry-run``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from taskloom.merge.ceiling import choose_budget
from taskloom.merge.device.account import device_budget
from taskloom.merge.device.choice import check_device_options, named_device
from taskloom.merge.planner import PlannedMerge
from taskloom.merge.shards import parse_size


@dataclass(frozen=True)
class Preview:
    """A plan in figures: counts, bytes, and the most anonymous memory (inputs are mapped from their files, so not counted).

    ``threads`` will be used; ``least_max_ram`` is the lowest ceiling of memory that would do. On a device the figures of memory are
    ``device_memory``, the most that torch takes of it, ``least_max_vram``, ``largest_tensor``, which that is for, and ``pinned_memory``
    on the host; all of them None without a device.
    """

    method: str
    base_model: str | None
    models: list[str]
    tensors_merged: int
    tensors_copied: int
    parameters_merged: int
    bytes_in: int
    bytes_out: int
    threads: int
    anonymous_memory: int
    least_max_ram: int
    files: dict[str, int]
    notes: list[str]
    device: str | None = None
    device_memory: int | None = None
    least_max_vram: int | None = None
    largest_tensor: str | None = None
    pinned_memory: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The preview as plain types."""
        return asdict(self)


def preview(
    planned: PlannedMerge,
    *,
    method: str,
    base_model: str | None,
    threads: int = 0,
    max_ram: str | int | None = None,
    device: str | None = None,
    max_vram: str | int | None = None,
    plot: bool = False,
) -> Preview:
    """Sum a plan up without reading any weight.

    Raises
    ------
    MergeError
        If ``max_ram`` or ``max_vram`` is no size, or too little for this merge. The device itself is not looked at: a plan may be made
        where it is not.
    """
    jobs = planned.plan.jobs
    merged = [job for job in jobs if job.stages is not None]
    name = named_device(device)
    check_device_options(name, max_vram, max_ram)
    vram = None if max_vram is None else parse_size(max_vram, "max_vram")
    on_device = None if name is None else device_budget(planned.plan, vram, magnitude_histogram=plot)
    ceiling = None if max_ram is None else parse_size(max_ram, "max_ram")
    budget = choose_budget(planned.plan, threads=threads, max_ram=ceiling, plot=plot)
    return Preview(
        method=method,
        base_model=base_model,
        models=list(planned.plan.models),
        tensors_merged=len(merged),
        tensors_copied=len(jobs) - len(merged),
        parameters_merged=sum(prod(job.shape) for job in merged),
        bytes_in=planned.bytes_in,
        bytes_out=sum(file.size for file in planned.plan.outputs),
        threads=budget.threads,
        anonymous_memory=budget.needed,
        least_max_ram=budget.least,
        files={file.name: file.size for file in planned.plan.outputs},
        notes=[*planned.notes, *budget.notes],
        device=name,
        device_memory=None if on_device is None else on_device.needed,
        least_max_vram=None if on_device is None else on_device.least,
        largest_tensor=None if on_device is None else on_device.largest,
        pinned_memory=None if on_device is None else on_device.pinned,
    )
