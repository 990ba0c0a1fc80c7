"""Streams pieces of tensors: read from files by position, and shared out among threads that run torch's ops on one core each.

Files are read by position instead of mapped: a file that shrinks meanwhile is then an error and not a signal, and nothing depends on how a
header aligns its tensors. A piece fits into a core's cache; an op that shares it out among cores waits for them longer than it computes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch

from taskloom.merge.errors import CheckpointError

Piece = TypeVar("Piece")


def open_to_read(file: Path) -> int:
    """A descriptor of a file; CheckpointError if it cannot be opened."""
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error


def read_at(descriptor: int, offset: int, target: memoryview, file: Path) -> None:
    """Fill memory with a file's bytes from an offset on, safely from several threads.

    Raises
    ------
    CheckpointError
        If they cannot be read, or the file ends before.
    """
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{file}: changed while it was read: it ends at byte {offset + done}")
        done += count


def share_out(
    pieces: Iterator[Piece],
    opened: Callable[[], AbstractContextManager[Callable[[Piece], None]]],
    threads: int,
    on_done: Callable[[Piece], None] | None = None,
) -> None:
    """Do some work on every piece, without gradients, several at a time.

    Parameters
    ----------
    pieces
        Are begun in order.
    opened
        Makes each thread's own work.
    threads
        The calling one included.
    on_done
        Called from the calling thread, after each of its own pieces.

    Raises
    ------
    Exception
        The first that the work of any thread raises; the others stop after their piece.
    """
    lock, stop = threading.Lock(), threading.Event()
    # A tensor that the caller made in inference mode can be written to in inference mode only, which every thread has for itself.
    inference = torch.is_inference_mode_enabled()

    def take() -> Piece | None:
        with lock:
            return None if stop.is_set() else next(pieces, None)

    def loop(own: Callable[[Piece], None] | None) -> None:
        try:
            torch.set_num_threads(1)
            with torch.inference_mode(inference), torch.no_grad(), opened() as work:
                while (piece := take()) is not None:
                    work(piece)
                    if own is not None:
                        own(piece)
        except BaseException:
            stop.set()
            raise

    before = torch.get_num_threads()
    try:
        # Its threads are made when something is handed in.
        with ThreadPoolExecutor(max(1, threads - 1)) as pool:
            try:
                others = [pool.submit(loop, None) for _ in range(threads - 1)]
                loop(on_done)
                for other in others:
                    other.result()
            except BaseException:
                stop.set()
                raise
    finally:
        torch.set_num_threads(before)
