"""The lock that the threads of a pipeline share, and how one that fails stops the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

# A thread that is told of nothing looks up so often, in seconds.
_TICK = 0.1
_STACK = 2**20


class Stopped(Exception):
    """Another thread of the pipeline has failed, and holds the reason."""


class Gate:
    """State that several threads change under one lock, and wait for.

    Parameters
    ----------
    threads
        How many will be started.
    tick
        Called now and then by a thread that waits, where that is the one which made the gate.
    """

    def __init__(self, threads: int, tick: Callable[[], None] | None = None) -> None:
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._owner = threading.get_ident()
        self._tick = tick
        self._running = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="taskloom device")

    @property
    def error(self) -> BaseException | None:
        """What the first thread that failed raised."""
        return self._error

    @property
    def idle(self) -> bool:
        """Whether every thread that was started has ended."""
        return self._running == 0

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the shared state inside the block; who waits for it is told."""
        with self._changed:
            yield
            self._changed.notify_all()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until ``ready()``, which is called under the lock, and may take what it finds.

        Raises
        ------
        Stopped
            If another thread failed.
        """
        own = self._tick is not None and threading.get_ident() == self._owner
        while True:
            with self._changed:
                if self._error is not None:
                    raise Stopped
                if ready():
                    self._changed.notify_all()
                    return
                self._changed.wait(_TICK if own else None)
            if own and self._tick is not None:
                self._tick()

    def fail(self, error: BaseException) -> None:
        """Stop every thread; the first error is kept."""
        with self.changing():
            if self._error is None:
                self._error = error

    def start(self, work: Callable[[], None]) -> None:
        """Run ``work`` in a thread of its own; what it raises stops the others."""
        with self._changed:
            self._running += 1
        usual = threading.stack_size(_STACK)
        try:
            self._pool.submit(work).add_done_callback(self._ended)
        except BaseException:
            with self._changed:
                self._running -= 1
            raise
        finally:
            threading.stack_size(usual)

    def _ended(self, work: Future[None]) -> None:
        error = work.exception()
        with self.changing():
            self._running -= 1
            if self._error is None and not isinstance(error, Stopped):
                self._error = error

    def join(self) -> None:
        """Wait for all threads, come what may: they use what the caller would take away."""
        interruption: BaseException | None = None
        while True:
            try:
                with self._changed:
                    while self._running:
                        self._changed.wait()
                break
            except KeyboardInterrupt as error:
                interruption = error
                self.fail(error)
        self._pool.shutdown(wait=False)
        if interruption is not None:
            raise interruption
