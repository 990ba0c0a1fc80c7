"""Regions of one block of device memory, taken and given back in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from taskloom.merge.device.accelerator import Mark


@dataclass(eq=False)
class Region:
    """Bytes ``begin .. end`` of the block; ``mark`` is what must have happened on the device before they are used again."""

    begin: int
    end: int
    released: bool = False
    mark: Mark | None = None


class Ring:
    """Where in a block of ``capacity`` bytes the next region lies; not locked, whoever uses it from several threads does that."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: deque[Region] = deque()
        self._marks: list[Mark] = []

    def _drop_released(self) -> None:
        while self._taken and self._taken[0].released:
            mark = self._taken.popleft().mark
            if mark is not None:
                self._marks.append(mark)

    def _place(self, count: int) -> int | None:
        if not self._taken:
            return 0
        first, last = self._taken[0], self._taken[-1]
        if last.begin < first.begin:
            return last.end if last.end + count <= first.begin else None
        if last.end + count <= self.capacity:
            return last.end
        return 0 if count <= first.begin else None

    def take(self, count: int) -> tuple[Region, list[Mark]] | None:
        """A region of ``count`` bytes, and what to wait for before it is written to; None where there is no room now.

        Raises
        ------
        ValueError
            If there could never be room.
        """
        if not 0 < count <= self.capacity:
            raise ValueError(f"count: expected 1 to {self.capacity} bytes, got {count}")
        self._drop_released()
        begin = self._place(count)
        if begin is None:
            return None
        region = Region(begin, begin + count)
        self._taken.append(region)
        marks, self._marks = self._marks, []
        return region, marks
