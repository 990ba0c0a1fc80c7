"""What the pipeline needs of a device: memory, three streams, and marks in them. On the CPU there is nothing to wait for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor

Lane = Literal["read", "merge", "write"]
LANES: tuple[Lane, ...] = ("read", "merge", "write")


def of_a_device(error: RuntimeError) -> bool:
    """Whether a device or its driver failed, and not a call of ours: torch's errors of CUDA, and Triton's."""
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or str(error).startswith(("CUDA error", "CUDA driver error", "Triton Error"))


class Mark(Protocol):
    """A place in a lane's work."""

    def wait(self) -> None:
        """Return when the work before it is done."""


class Accelerator(ABC):
    """A device, with a lane of work for each direction of copies and one for the merge.

    Attributes
    ----------
    device
        Where tensors lie.
    name
        Of the device, for the report.
    """

    device: torch.device
    name: str

    @abstractmethod
    def pinned(self, count: int) -> Tensor:
        """``count`` bytes of host memory that copies run through by themselves."""

    @abstractmethod
    def lane(self, lane: Lane) -> AbstractContextManager[object]:
        """Work started inside the block goes into this lane."""

    @abstractmethod
    def mark(self, lane: Lane) -> Mark:
        """A mark behind what is in a lane now."""

    @abstractmethod
    def follow(self, lane: Lane, mark: Mark) -> None:
        """Let what comes into a lane from now on wait for a mark."""

    @abstractmethod
    def limited(self, count: int) -> AbstractContextManager[None]:
        """Inside the block torch takes no more than ``count`` bytes of the device beyond what it holds already."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work on the device."""

    @abstractmethod
    def free(self) -> int | None:
        """Bytes of the device's memory that nobody holds; None where nobody counts them."""

    def empty(self, count: int) -> Tensor:
        """``count`` bytes of the device's memory."""
        with self.lane("merge"):
            return torch.empty(count, dtype=torch.uint8, device=self.device)

    def to_host(self, values: Tensor) -> Tensor:
        """A copy in host memory, complete when a mark that is set afterwards is reached."""
        host = self.pinned(values.nbytes).view(values.dtype).reshape(values.shape)
        return host.copy_(values, non_blocking=True)


class _Reached:
    def wait(self) -> None:
        return None


class HostAccelerator(Accelerator):
    """The CPU: every piece of work is done when it is started."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = "the CPU"

    def pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8)

    def lane(self, lane: Lane) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self, lane: Lane) -> Mark:
        return _Reached()

    def follow(self, lane: Lane, mark: Mark) -> None:
        return None

    def limited(self, count: int) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        return None

    def free(self) -> int | None:
        return None


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaAccelerator(Accelerator):
    """A CUDA device with a stream for each lane."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)
        self._streams = {lane: torch.cuda.Stream(device) for lane in LANES}

    def pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def lane(self, lane: Lane) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[lane])

    def mark(self, lane: Lane) -> Mark:
        # Who waits for it sleeps: the cores are wanted for reading and writing.
        event = torch.cuda.Event(blocking=True)
        event.record(self._streams[lane])
        return _CudaMark(event)

    def follow(self, lane: Lane, mark: Mark) -> None:
        if isinstance(mark, _CudaMark):
            self._streams[lane].wait_event(mark.event)

    @contextmanager
    def limited(self, count: int) -> Iterator[None]:
        before = torch.cuda.get_per_process_memory_fraction(self.device)
        held = torch.cuda.memory_reserved(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(before, (held + count) / total), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free(self) -> int:
        # What torch keeps for its next tensors is free too.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return free
