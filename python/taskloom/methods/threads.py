"""How many threads an experiment's small models are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one CPU thread.

    The matrix products are too small to share: more threads gain little on an idle machine, wait for each other on a busy one (twenty
    times slower was seen), and may change the order of the sums.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
