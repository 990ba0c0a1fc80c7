from __future__ import annotations

from typing import Any

import pytest

from taskloom.merge.errors import MergeError
from taskloom.merge.shards import PlannedTensor, lay_out, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("5b", 5 * 10**9),
        ("500M", 5 * 10**8),
        ("1.5 kB", 1500),
        ("1GiB", 2**30),
        ("2mi", 2**21),
        ("1TB", 10**12),
        ("123", 123),
        (4096, 4096),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-1GB", "0", 0, "1e9", "5GBB", "inf", "0.1"])
def test_refused_sizes(text: Any) -> None:
    with pytest.raises(MergeError, match="shard size: expected a size such as 5GB"):
        parse_size(text)


def _tensors(**sizes: int) -> list[PlannedTensor]:
    return [PlannedTensor(name, "U8", (size,)) for name, size in sizes.items()]


def test_shards_fill_in_order() -> None:
    layout = lay_out(_tensors(a=4, b=4, c=9, d=1, e=8), 9)
    first, second, third = (f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
    assert layout.weight_map == {"a": first, "b": first, "c": second, "d": third, "e": third}
    assert [file.name for file in layout.files] == [first, second, third]
    assert layout.total_size == 26


def test_a_tensor_above_the_limit_has_its_own_shard() -> None:
    layout = lay_out(_tensors(a=2, b=100, c=2), 10)
    assert [layout.targets[name].file for name in "abc"] == [0, 1, 2]


def test_one_file_has_no_index() -> None:
    layout = lay_out(_tensors(a=2, b=3), 5)
    assert ([file.name for file in layout.files], layout.weight_map) == (["model.safetensors"], {})
    assert lay_out([], 5).files[0].size == len(lay_out([], 5).files[0].header)


def test_wider_types_come_first_so_that_all_are_aligned() -> None:
    tensors = [
        PlannedTensor("x", "U8", (3,)),
        PlannedTensor("y", "F64", (2,)),
        PlannedTensor("z", "BF16", (3,)),
        PlannedTensor("w", "F32", (1,)),
    ]
    layout = lay_out(tensors, 1000)
    assert sorted(layout.targets, key=lambda name: layout.targets[name].offset) == ["y", "w", "z", "x"]
    for name, width in {"x": 1, "y": 8, "z": 2, "w": 4}.items():
        assert layout.targets[name].offset % width == 0
