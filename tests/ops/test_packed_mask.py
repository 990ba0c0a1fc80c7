"""What the compiled side of unpack_mask checks by itself: the op may be called without its wrapper."""

from __future__ import annotations

import pytest
import torch

from taskloom.ops import unpack_mask


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([9], "packed: expected 2 bytes for 9 entries, got 1"),
        ([-8], "shape: sizes must not be negative"),
        ([2**32, 2**32], "shape: more entries than 64 bits count"),
    ],
)
def test_the_op_refuses_shapes_that_the_bytes_do_not_fill(shape: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taskloom.unpack_mask.default(torch.zeros(1, dtype=torch.uint8), shape)


def test_the_wrapper_takes_what_the_op_takes() -> None:
    assert unpack_mask(torch.tensor([0b101], dtype=torch.uint8), (3,)).tolist() == [True, False, True]
