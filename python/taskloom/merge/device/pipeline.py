"""Brings tensors from files onto a device, hands them to whoever merges them, and writes what came out, all three at once.

Reading threads fill pinned buffers and start their copies to the device in the ``read`` lane; the thread that calls :meth:`Pipeline.run`
merges in the ``merge`` lane; a writing thread copies back in the ``write`` lane and writes to the file. A tensor has a region of one block
of device memory from before its first byte is read until its last one is copied back, so reading runs as far ahead as there is room.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from taskloom.merge.device.accelerator import Accelerator, Mark
from taskloom.merge.device.account import DeviceBudget, needs_device, region_parts
from taskloom.merge.device.gate import Gate, Stopped
from taskloom.merge.device.ring import Region, Ring
from taskloom.merge.header import tensor_bytes
from taskloom.merge.plan import TensorJob, TensorSource
from taskloom.merge.torch_dtypes import TORCH_DTYPES


class Source(Protocol):
    """Where input bytes come from."""

    def read(self, file: int, offset: int, buffer: Tensor, count: int) -> None:
        """Read bytes of one input into the beginning of a buffer."""


class Target(Protocol):
    """Where output bytes go."""

    def write(self, offset: int, address: int, count: int, /) -> None:
        """Write so many bytes that lie at an address."""


@dataclass(eq=False)
class Load:
    """A job on its way: its tensors on the device (none for a plain copy), and when its merge began."""

    job: TensorJob
    region: Region | None = None
    base: Tensor | None = None
    tuned: list[Tensor] = field(default_factory=list)
    out: Tensor | None = None
    left: int = 0
    read: Mark | None = None
    merged: Mark | None = None
    began: float = 0.0
    unwritten: int = 0


@dataclass(eq=False)
class _Buffer:
    """A pinned buffer; ``mark`` is the copy that uses it."""

    memory: Tensor
    mark: Mark | None = None

    def wait(self) -> None:
        if self.mark is not None:
            self.mark.wait()
            self.mark = None


@dataclass(frozen=True)
class _Piece:
    """Some bytes of an input, and where on the device they go."""

    load: Load
    file: int
    offset: int
    to: Tensor


@dataclass(frozen=True)
class _Written:
    """A buffer of output bytes on its way to the file."""

    load: Load
    buffer: _Buffer
    count: int
    offset: int


class Memory:
    """The block on the device and the pinned buffers, taken once."""

    def __init__(self, accelerator: Accelerator, budget: DeviceBudget) -> None:
        self.accelerator = accelerator
        self.block = accelerator.empty(budget.block) if budget.block else None
        self.ring = Ring(budget.block)
        self.piece = budget.piece
        self.free = deque(_Buffer(accelerator.pinned(budget.piece)) for _ in range(budget.pieces_in))
        self.out = deque(_Buffer(accelerator.pinned(budget.piece)) for _ in range(budget.pieces_out))

    def parts(self, job: TensorJob, region: Region) -> tuple[list[Tensor], Tensor]:
        """The tensors of a job in its region: base and tuned ones, and the output."""
        if self.block is None:
            raise ValueError("a merge without a block has no regions")
        dtypes = [source.dtype for source in (job.base, *job.tuned) if source is not None]
        tensors = []
        for dtype, offset in zip((*dtypes, job.target.dtype), region_parts(job), strict=False):
            begin = region.begin + offset
            part = self.block[begin : begin + tensor_bytes(dtype, job.shape)]
            tensors.append(part.view(TORCH_DTYPES[dtype]).view(job.shape))
        return tensors[:-1], tensors[-1]


class Pipeline:
    """One stream of jobs through the device.

    Parameters
    ----------
    memory, source
        Buffers, which nobody else uses meanwhile, and the inputs.
    merge
        Called in the ``merge`` lane by the thread that calls :meth:`run`, for each job that needs the device, once its inputs are there
        (for the device).
    readers
        Threads that read.
    target, finish
        Where outputs go (None: there are none), and what is called in the writing thread for each job once its merge is done and before
        anything of it is written (``False``), and when all of it is (``True``).
    count
        Called with numbers of bytes that were read or written, from any thread.
    tick
        Called now and then in the thread of :meth:`run`.
    """

    def __init__(
        self,
        memory: Memory,
        source: Source,
        merge: Callable[[Load], None],
        *,
        readers: int,
        target: Target | None = None,
        finish: Callable[[Load, bool], None] | None = None,
        count: Callable[[int], None] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self._memory = memory
        self._accelerator = memory.accelerator
        self._source = source
        self._merge = merge
        self._readers = readers
        self._target = target
        self._finish = finish or (lambda load, written: None)
        self._count = count or (lambda count: None)
        self._tick = tick or (lambda: None)
        self._gate = Gate(readers + 2, tick)
        self._loads: deque[Load] = deque()
        self._pieces: deque[_Piece] = deque()
        self._done: deque[Load] = deque()
        self._all_fed = self._all_merged = False

    def run(self, jobs: Sequence[TensorJob]) -> None:
        """Carry the jobs out in order; raises what the first thread that failed raised."""
        gate = self._gate
        try:
            gate.start(lambda: self._feed(jobs))
            for _ in range(self._readers):
                gate.start(self._read)
            if self._target is not None:
                gate.start(self._write)
            self._merge_all(len(jobs))
            gate.wait(lambda: gate.idle)
        except Stopped:
            pass
        except BaseException as error:
            gate.fail(error)
            raise
        finally:
            gate.join()
        if gate.error is not None:
            raise gate.error

    # The feeding thread: gives each job its region, in order.

    def _feed(self, jobs: Sequence[TensorJob]) -> None:
        for job in jobs:
            load = Load(job)
            pieces: list[_Piece] = []
            if needs_device(job):
                load.region = self._take_region(region_parts(job)[-1])
                tensors, load.out = self._memory.parts(job, load.region)
                load.base, load.tuned = (None, tensors) if job.base is None else (tensors[0], tensors[1:])
                sources = [source for source in (job.base, *job.tuned) if source is not None]
                pieces = [piece for source, to in zip(sources, tensors, strict=True) for piece in self._cut(load, source, to)]
                load.left = len(pieces)
            with self._gate.changing():
                self._loads.append(load)
                self._pieces.extend(pieces)
        with self._gate.changing():
            self._all_fed = True

    def _take_region(self, count: int) -> Region:
        taken: list[tuple[Region, list[Mark]]] = []

        def ready() -> bool:
            found = self._memory.ring.take(count)
            if found is not None:
                taken.append(found)
            return found is not None

        self._gate.wait(ready)
        region, marks = taken[0]
        for mark in marks:
            mark.wait()
        return region

    def _cut(self, load: Load, source: TensorSource, to: Tensor) -> Iterator[_Piece]:
        flat = to.reshape(-1).view(torch.uint8)
        for begin in range(0, flat.numel(), self._memory.piece):
            yield _Piece(load, source.file, source.offset + begin, flat[begin : begin + self._memory.piece])

    # The reading threads.

    def _read(self) -> None:
        while True:
            taken: list[tuple[_Piece, _Buffer]] = []

            def ready(taken: list[tuple[_Piece, _Buffer]] = taken) -> bool:
                if self._pieces and self._memory.free:
                    taken.append((self._pieces.popleft(), self._memory.free.popleft()))
                return bool(taken) or (self._all_fed and not self._pieces)

            self._gate.wait(ready)
            if not taken:
                return
            piece, buffer = taken[0]
            try:
                self._read_piece(piece, buffer)
            finally:
                with self._gate.changing():
                    self._memory.free.append(buffer)

    def _read_piece(self, piece: _Piece, buffer: _Buffer) -> None:
        buffer.wait()
        count = piece.to.numel()
        self._source.read(piece.file, piece.offset, buffer.memory, count)
        with self._accelerator.lane("read"):
            piece.to.copy_(buffer.memory[:count], non_blocking=True)
        buffer.mark = self._accelerator.mark("read")
        self._count(count)
        with self._gate.changing():
            piece.load.left -= 1
            if piece.load.left == 0:
                # Behind the copies of all pieces: whoever started one has counted it after that.
                piece.load.read = self._accelerator.mark("read")

    # The calling thread.

    def _merge_all(self, count: int) -> None:
        for _ in range(count):
            self._gate.wait(lambda: bool(self._loads) and self._loads[0].left == 0)
            load = self._loads[0]
            load.began = time.perf_counter()
            if load.read is not None:
                self._accelerator.follow("merge", load.read)
            if load.region is not None:
                with self._accelerator.lane("merge"):
                    self._merge(load)
                load.merged = self._accelerator.mark("merge")
            with self._gate.changing():
                self._loads.popleft()
                if self._target is not None:
                    self._done.append(load)
                elif load.region is not None:
                    load.region.mark = load.merged
                    load.region.released = True
            self._tick()
        with self._gate.changing():
            self._all_merged = True

    # The writing thread.

    def _write(self) -> None:
        under_way: deque[_Written] = deque()
        while True:
            taken: list[Load] = []

            def ready(taken: list[Load] = taken) -> bool:
                if self._done:
                    taken.append(self._done.popleft())
                return bool(taken) or bool(under_way) or self._all_merged

            self._gate.wait(ready)
            if taken:
                self._send(taken[0], under_way)
            elif under_way:
                self._store(under_way.popleft())
            else:
                return

    def _send(self, load: Load, under_way: deque[_Written]) -> None:
        """Start the copies of an output to the host, and write what has come before."""
        while under_way:
            self._store(under_way.popleft())
        if load.merged is not None:
            load.merged.wait()
        self._finish(load, False)
        total = tensor_bytes(load.job.target.dtype, load.job.shape)
        pieces = range(0, total, self._memory.piece)
        load.unwritten = len(pieces)
        for begin in pieces:
            if not self._memory.out:
                self._store(under_way.popleft())
            buffer = self._memory.out.popleft()
            count = min(self._memory.piece, total - begin)
            self._fill(load, buffer, begin, count)
            under_way.append(_Written(load, buffer, count, load.job.target.offset + begin))
        if load.region is not None:
            load.region.mark = self._accelerator.mark("write")
            with self._gate.changing():
                load.region.released = True
        if not pieces:
            self._finish(load, True)

    def _fill(self, load: Load, buffer: _Buffer, begin: int, count: int) -> None:
        if load.out is not None:
            with self._accelerator.lane("write"):
                values = load.out.reshape(-1).view(torch.uint8)[begin : begin + count]
                buffer.memory[:count].copy_(values, non_blocking=True)
            buffer.mark = self._accelerator.mark("write")
        elif load.job.base is not None:
            self._source.read(load.job.base.file, load.job.base.offset + begin, buffer.memory, count)
            self._count(count)

    def _store(self, written: _Written) -> None:
        try:
            written.buffer.wait()
            if self._target is not None:
                self._target.write(written.offset, written.buffer.memory.data_ptr(), written.count)
        finally:
            self._memory.out.append(written.buffer)
        self._count(written.count)
        written.load.unwritten -= 1
        if written.load.unwritten == 0:
            self._finish(written.load, True)
