"""Pieces of tensors: read by position, and shared out among threads."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from taskloom.merge.errors import CheckpointError
from taskloom.merge.pieces import open_to_read, read_at, share_out


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_piece_is_worked_on_once_without_gradients_on_one_core(threads: int) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    own: list[int] = []
    lock = threading.Lock()

    def work(piece: int) -> None:
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        with lock:
            seen.append(piece)

    share_out(iter(range(50)), lambda: nullcontext(work), threads, own.append)
    assert sorted(seen) == list(range(50))
    assert set(own) <= set(seen)
    assert threads > 1 or own == seen
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_stops_all(threads: int) -> None:
    before = torch.get_num_threads()
    begun: list[int] = []

    def work(piece: int) -> None:
        begun.append(piece)
        if piece == 3:
            raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        share_out(iter(range(10**9)), lambda: nullcontext(work), threads)
    assert 3 in begun
    assert torch.get_num_threads() == before


def test_files_that_are_missing_or_too_short(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        open_to_read(tmp_path / "none")
    file = tmp_path / "short"
    file.write_bytes(b"0123456789")
    with file.open("rb") as opened:
        target = bytearray(4)
        read_at(opened.fileno(), 3, memoryview(target), file)
        assert target == b"3456"
        with pytest.raises(CheckpointError, match="changed while it was read: it ends at byte 10"):
            read_at(opened.fileno(), 8, memoryview(target), file)
