"""masked_adamw_, masked_sgd_: all parameters of one dtype whose active entries are named alike are stepped by one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taskloom.triton_kernels.launch import aligned, entries_per_program, flat, launch, programs, raw, table
from taskloom.triton_kernels.masked.masked_step_kernels import (
    ALL,
    COLUMNS,
    INDEXED,
    NUMBERS,
    PACKED,
    check_indices_kernel,
    count_active_kernel,
    masked_adamw_kernel,
    masked_sgd_kernel,
)

_KINDS = {torch.bool: ALL, torch.uint8: PACKED, torch.int32: INDEXED, torch.int64: INDEXED}
_MOST_NUMBERS = COLUMNS.value - NUMBERS.value


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _check_apart(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Refuse a written tensor that shares memory with any other."""
    spans = [(*_span(tensor), number < len(written)) for number, tensor in enumerate((*written, *read)) if tensor.numel()]
    any_end = written_end = 0
    for begin, end, is_written in sorted(spans):
        if begin < (any_end if is_written else written_end):
            raise RuntimeError("params and state must not share memory with another argument")
        any_end = max(any_end, end)
        if is_written:
            written_end = max(written_end, end)


def _wrong_indices(place: int, numel: int) -> str:
    return f"active[{place}]: expected ascending indices without repeats, from 0 to below {numel}"


def _wrong_state(name: str, place: int, expected: int, got: int) -> str:
    return f"{name}[{place}]: expected {expected} elements, one for each active entry, got {got}"


def _require(fine: Tensor, message: str) -> None:
    """Refuse what the device has found wrong; a CUDA device stops at an assertion before anything is written, and nobody waits for it."""
    if fine.device.type == "cuda":
        torch.ops.aten._assert_async.msg(fine, message)
    elif not bool(fine):
        raise RuntimeError(message)


class _Group:
    """Parameters that one launch steps: their table on the device, and what its addresses point to."""

    def __init__(
        self,
        places: list[int],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: dict[str, Sequence[Tensor]],
        active: Sequence[Tensor],
        numbers: Sequence[Sequence[float]],
    ) -> None:
        self.places, self.state = places, {name: [tensors[place] for place in places] for name, tensors in state.items()}
        self.params = [params[place] for place in places]
        self.targets = [param.contiguous() for param in self.params]
        self.grads = [flat(grads[place]) for place in places]
        self.active = [flat(active[place]) for place in places]
        self.kind = _KINDS[active[places[0]].dtype]
        self.device = self.params[0].device
        indexed = self.kind is INDEXED
        entries = [(one if indexed else param).numel() for one, param in zip(self.active, self.params, strict=True)]
        # Numbers of 64 bits take twice the registers, and their roots and quotients are calls around which registers are saved.
        self.block = entries_per_program(sum(entries), 512 if params[places[0]].dtype == torch.float64 else 2048)
        blocks = [programs(count, self.block) for count in entries]
        self.programs = sum(blocks)
        self.starts = [sum(blocks[:place]) for place in range(len(blocks) + 1)]
        columns = [self.targets, self.grads, *self.state.values(), *[self.active] * (2 - len(self.state)), self.active]
        rows = [
            (*(tensors[row].data_ptr() for tensors in columns), param.numel(), self.active[row].numel(), self.starts[row])
            for row, param in enumerate(self.params)
        ]
        listed = [(*numbers[place], *[0.0] * (_MOST_NUMBERS - len(numbers[place]))) for place in places]
        bits = torch.tensor(listed, dtype=torch.float64).view(torch.int64).tolist()
        self.table = table([(*row, *one) for row, one in zip(rows, bits, strict=True)], self.device)
        numbered = torch.arange(len(places), device=self.device)
        self.owners = numbered.repeat_interleave(table(blocks, self.device), output_size=self.programs)
        self.before = self.table
        self.aligned = aligned([tensor for tensors in columns[:-1] for tensor in tensors])

    def check(self) -> None:
        """Refuse states of another size and wrong indices; find the place of each program's first entry."""
        if self.kind is PACKED:
            self._count()
            return
        for row, place in enumerate(self.places):
            expected = (self.active[row] if self.kind is INDEXED else self.params[row]).numel()
            for name, tensors in self.state.items():
                if tensors[row].numel() != expected:
                    raise RuntimeError(_wrong_state(name, place, expected, tensors[row].numel()))
        if self.kind is INDEXED:
            self._check_indices()

    def _count(self) -> None:
        counts = torch.empty(self.programs, dtype=torch.int64, device=self.device)
        launch(count_active_kernel, (self.programs,), self.table, self.owners, self.active[0], counts, BLOCK=self.block)
        self.before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        found = self.before[table(self.starts, self.device)].diff()
        self.check_counts(found)

    def check_counts(self, found: Tensor) -> None:
        """Refuse states whose size is not the number of active entries."""
        for name, tensors in self.state.items():
            sizes = [tensor.numel() for tensor in tensors]
            if self.device.type == "cuda":
                _require((found == table(sizes, self.device)).all(), f"{name}: expected one element for each active entry")
                continue
            for place, expected, got in zip(self.places, found.tolist(), sizes, strict=True):
                if expected != got:
                    raise RuntimeError(_wrong_state(name, place, expected, got))

    def _check_indices(self) -> None:
        wrong = torch.empty(self.programs, dtype=torch.int64, device=self.device)
        launch(check_indices_kernel, (self.programs,), self.table, self.owners, self.active[0], wrong, BLOCK=self.block)
        if self.device.type == "cuda":
            _require((wrong == 0).all(), "active: expected ascending indices without repeats, from 0 to below the parameter's size")
            return
        for row, place in enumerate(self.places):
            _require((wrong[self.starts[row] : self.starts[row + 1]] == 0).all(), _wrong_indices(place, self.params[row].numel()))

    def step(self, kernel: Any, constants: dict[str, Any]) -> None:
        """Launch a kernel, and put copies back."""
        like_state = next(iter(self.state.values()))[0] if self.state else self.table
        arguments = (raw(self.targets[0]), self.grads[0], like_state, self.active[0], self.table, self.owners, self.before)
        wide = self.params[0].dtype == torch.float64
        own = {"KIND": self.kind.value, "WIDE": wide, "ALIGNED": self.aligned, "BLOCK": self.block}
        launch(kernel, (self.programs,), *arguments, **constants, **own)
        for param, target in zip(self.params, self.targets, strict=True):
            if target is not param:
                param.copy_(target)


def _run(
    kernel: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: dict[str, Sequence[Tensor]],
    active: Sequence[Tensor],
    numbers: Sequence[Sequence[float]],
    constants: dict[str, Any],
) -> None:
    _check_apart([*params, *(tensor for tensors in state.values() for tensor in tensors)], [*grads, *active])
    named: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for place, (param, entries) in enumerate(zip(params, active, strict=True)):
        named.setdefault((param.dtype, entries.dtype), []).append(place)
    groups = [_Group(places, params, grads, state, active, numbers) for places in named.values()]
    for group in groups:
        group.check()
    for group in groups:
        group.step(kernel, constants)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    active: Sequence[Tensor],
    step: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Launch :func:`taskloom.masked_adamw_`."""
    numbers = [
        (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**count), eps, -(lr / (1 - beta1**count))) for count in step
    ]
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    _run(masked_adamw_kernel, params, grads, state, active, numbers, {"MAXIMIZE": maximize})


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    active: Sequence[Tensor],
    step: Sequence[float],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Launch :func:`taskloom.masked_sgd_`."""
    numbers = [(-lr, momentum, 1 - dampening, weight_decay, float(count <= 1)) for count in step]
    state = {"momentum_buffer": momentum_buffer} if momentum != 0 else {}
    constants = {"MAXIMIZE": maximize, "DECAYS": weight_decay != 0, "MOMENTUM": momentum != 0, "NESTEROV": nesterov}
    _run(masked_sgd_kernel, params, grads, state, active, numbers, constants)
