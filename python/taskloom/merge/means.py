"""What a merge is carried out with: the compiled executor's threads and buffers, or a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taskloom.merge.ceiling import choose_budget, megabytes
from taskloom.merge.plan import MergePlan
from taskloom.merge.shards import parse_size

if TYPE_CHECKING:
    from taskloom.merge.execute import FileExecutor


@dataclass(frozen=True)
class Means:
    """The arguments of :func:`taskloom.merge.execute.execute_plan` that say how, and notes for the report."""

    threads: int
    room: int | None
    make_executor: Callable[[list[tuple[str, bytes, int]]], FileExecutor] | None
    notes: tuple[str, ...]


def choose_means(
    plan: MergePlan,
    *,
    threads: int = 0,
    max_ram: str | int | None = None,
    device: str | None = None,
    max_vram: str | int | None = None,
    plot: bool = False,
) -> Means:
    """Choose memory within the ceilings, and open the device where one was asked for.

    Raises
    ------
    MergeError
        If a ceiling is too low or is no size, or the device cannot be used.
    """
    from taskloom.merge.device.choice import check_device_options, named_device

    name = named_device(device)
    check_device_options(name, max_vram, max_ram)
    if name is None:
        budget = choose_budget(plan, threads=threads, max_ram=None if max_ram is None else parse_size(max_ram, "max_ram"), plot=plot)
        return Means(budget.threads, budget.room, None, budget.notes)
    return _on_device(plan, name, None if max_vram is None else parse_size(max_vram, "max_vram"), threads, plot)


def _on_device(plan: MergePlan, name: str, max_vram: int | None, threads: int, plot: bool) -> Means:
    from taskloom.merge.device import choice
    from taskloom.merge.device.account import device_budget
    from taskloom.merge.execute import thread_count

    accelerator = choice.open_device(name)
    budget = device_budget(plan, max_vram, free=accelerator.free(), magnitude_histogram=plot)

    def make_executor(outputs: list[tuple[str, bytes, int]]) -> FileExecutor:
        from taskloom.merge.device.executor import DeviceExecutor

        return DeviceExecutor(
            plan, outputs, accelerator=accelerator, budget=budget, magnitude_histogram=plot, readers=thread_count(threads)
        )

    note = f"merged on {accelerator.device} ({accelerator.name}), with at most {megabytes(budget.needed)} of its memory"
    return Means(thread_count(threads), None, make_executor, (note,))
