"""Shares the pieces of a tensor out among threads, each of which runs torch's ops on one core."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch

Work = Callable[[int, int], None]


def over_pieces(pieces: Iterator[tuple[int, int]], opened: Callable[[], AbstractContextManager[Work]], threads: int) -> None:
    """Do some work on every piece, without gradients, several at a time.

    A piece fits into a core's cache; an op that shares it out among cores waits for them longer than it computes.

    Parameters
    ----------
    pieces
        Begin and length; begun in order.
    opened
        Makes each thread's own work.
    threads
        The calling one included.

    Raises
    ------
    Exception
        The first that the work of any thread raises; the others stop after their piece.
    """
    lock, stop = threading.Lock(), threading.Event()
    # A tensor that the caller made in inference mode can be written to in inference mode only, which every thread has for itself.
    inference = torch.is_inference_mode_enabled()

    def take() -> tuple[int, int] | None:
        with lock:
            return None if stop.is_set() else next(pieces, None)

    def loop() -> None:
        try:
            torch.set_num_threads(1)
            with torch.inference_mode(inference), torch.no_grad(), opened() as work:
                while (piece := take()) is not None:
                    work(*piece)
        except BaseException:
            stop.set()
            raise

    before = torch.get_num_threads()
    try:
        if threads == 1:
            loop()
            return
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(loop) for _ in range(threads - 1)]
            loop()
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(before)
