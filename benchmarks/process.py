"""Measures a command as its user meets it: wall and processor seconds of the whole process, and its peak memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_INTERVAL = 0.02
_PIECE = 4 << 20


@dataclass(frozen=True)
class Usage:
    """What one command took. Memory is in bytes.

    ``peak_resident`` counts mapped files that are in memory as well, ``peak_anonymous`` only what the process allocated; both are
    sums over the process tree, sampled every 20 ms. ``max_rss`` is the kernel's own figure for the largest single process.
    """

    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_resident: int
    peak_anonymous: int
    max_rss: int
    samples: int

    @property
    def cpu_seconds(self) -> float:
        return self.user_seconds + self.system_seconds


class CommandError(RuntimeError):
    """A measured command failed."""


def _process_tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _process_tree(int(child))


def _memory_of(pid: int) -> dict[str, int]:
    """The memory fields of /proc/PID/status in bytes."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "VmHWM"):
            fields[name] = int(value.split()[0]) * 1024
    return fields


class _MemorySampler(threading.Thread):
    """Follows a process tree until it is told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._stopped = threading.Event()
        self.peak_resident = 0
        self.peak_anonymous = 0
        self.max_rss = 0
        self.samples = 0

    def run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            try:
                found = [_memory_of(pid) for pid in _process_tree(self._pid)]
            except (FileNotFoundError, ProcessLookupError):
                # A process of the tree ended while it was looked at.
                continue
            self.samples += 1
            self.peak_resident = max(self.peak_resident, sum(memory.get("VmRSS", 0) for memory in found))
            self.peak_anonymous = max(self.peak_anonymous, sum(memory.get("RssAnon", 0) for memory in found))
            self.max_rss = max(self.max_rss, *(memory.get("VmHWM", 0) for memory in found))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def measure(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, its output going to ``log``.

    Raises
    ------
    CommandError
        If it fails; ends with the last lines of its output.
    """
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        sampler = _MemorySampler(process.pid)
        sampler.start()
        # wait4 gives the processor seconds of this child alone. Its ru_maxrss is not used: it starts from the parent's memory.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        sampler.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CommandError(f"{Path(command[0]).name} ended with status {process.returncode}:\n{tail}")
    return Usage(
        wall_seconds=wall,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        peak_resident=sampler.peak_resident,
        peak_anonymous=sampler.peak_anonymous,
        max_rss=sampler.max_rss,
        samples=sampler.samples,
    )


def _in_parallel(work: Sequence[tuple[int, int, int]], threads: int, write: bool) -> None:
    """Read or write pieces (descriptor, begin, end), each thread with one buffer of its own."""

    def transfer(mine: Sequence[tuple[int, int, int]]) -> None:
        buffer = memoryview(bytearray(_PIECE))
        call = os.pwritev if write else os.preadv
        for descriptor, begin, end in mine:
            while begin < end:
                moved = call(descriptor, [buffer[: min(_PIECE, end - begin)]], begin)
                if moved == 0:
                    raise OSError("a file became shorter while it was read")
                begin += moved

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(transfer, (work[thread::threads] for thread in range(threads))))


def _pieces(descriptor: int, size: int) -> list[tuple[int, int, int]]:
    return [(descriptor, begin, min(size, begin + _PIECE)) for begin in range(0, size, _PIECE)]


def seconds_to_read(files: Sequence[Path], threads: int) -> float:
    """Seconds to read whole files with plain reads into reused buffers."""
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    try:
        work = [piece for descriptor in descriptors for piece in _pieces(descriptor, os.fstat(descriptor).st_size)]
        start = time.perf_counter()
        _in_parallel(work, threads, write=False)
        return time.perf_counter() - start
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def seconds_to_write(path: Path, size: int, threads: int) -> float:
    """Seconds to fill a new file of ``size`` bytes with positioned writes; the file is removed again."""
    start = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.ftruncate(descriptor, size)
        _in_parallel(_pieces(descriptor, size), threads, write=True)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds
