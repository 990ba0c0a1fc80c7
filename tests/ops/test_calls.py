"""The short way from a wrapper to its kernel: what is kept from call to call, and what may never be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from contract import Recorder, assert_same_bits
from samples import random_packed, weights
from torch import Tensor

import taskloom
from taskloom.ops import _backends
from taskloom.ops._backends import OPS, kernel

MASK = torch.tensor([True, False, True, True])


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    with taskloom.backend("auto"):
        yield


def test_a_choice_is_made_once_for_a_device_and_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    choose = _backends.choose
    monkeypatch.setattr(_backends, "choose", lambda name, *tensors: made.append(_backends.requested_backend()) or choose(name, *tensors))
    monkeypatch.setitem(OPS, "pack_mask", _backends.Op("pack_mask", frozenset({"cpu"}), "reference"))
    for name in ("auto", "native", "reference", "auto", "reference", "native"):
        with taskloom.backend(name):
            for _ in range(3):
                assert (kernel("pack_mask", MASK) is None) == (name == "reference")
    assert made == ["auto", "native", "reference"]
    kernel("pack_mask", MASK.to("meta"))
    kernel("pack_mask", MASK.to("meta"))
    assert made[3:] == ["auto"]


def test_a_refusal_is_not_kept() -> None:
    for _ in range(2):
        with (
            taskloom.backend("triton"),
            pytest.raises(RuntimeError, match="backend 'triton' was asked for, but Triton kernels run on GPUs"),
        ):
            taskloom.pack_mask(MASK)
    assert taskloom.pack_mask(MASK).tolist() == [13]


def test_devices_may_not_be_mixed_in_any_order() -> None:
    a, b, packed = weights(9), weights(9, seed=1), random_packed(9)
    for given in ((a, packed, b.to("meta")), (a.to("meta"), packed, b), (a, packed.to("meta"), b)):
        with pytest.raises(ValueError, match=r"masked_update: all tensors must be on one device, got (cpu and meta|meta and cpu)"):
            taskloom.masked_update(*given)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_flow_exactly_where_they_are_wanted(wanted: tuple[bool, bool]) -> None:
    a, b = (weights(77, seed=seed).requires_grad_(one) for seed, one in enumerate(wanted))
    packed = random_packed(77)
    found = taskloom.masked_update(a, packed, b, 0.5)
    assert found.requires_grad == any(wanted)
    with torch.no_grad():
        silent = taskloom.masked_update(a, packed, b, 0.5)
    assert not silent.requires_grad
    assert_same_bits(silent, found.detach())
    if any(wanted):
        found.sum().backward()
    mask = taskloom.unpack_mask(packed, (77,))
    assert (a.grad is not None, b.grad is not None) == wanted
    if wanted[0]:
        assert a.grad.equal(torch.ones(77))
    if wanted[1]:
        assert b.grad.equal(0.5 * mask)


def test_modes_see_the_op_with_and_without_gradients() -> None:
    packed = random_packed(77)
    for tracked in (False, True):
        with Recorder() as recorder:
            taskloom.masked_update(weights(77).requires_grad_(tracked), packed, weights(77, seed=1))
        assert [str(op) for op, _, _ in recorder.calls] == ["taskloom.masked_update.default"]


def test_inference_tensors_are_taken() -> None:
    packed = random_packed(77)
    with torch.inference_mode():
        target, delta = weights(77), weights(77, seed=1)
        expected = taskloom.masked_update(target, packed, delta)
        taskloom.masked_update_(target, packed, delta)
        assert target.equal(expected)


def test_a_changed_tensor_is_noticed_by_autograd() -> None:
    leaf, target = weights(77).requires_grad_(), weights(77)
    product = (leaf * target).sum()
    taskloom.masked_update_(target, random_packed(77), weights(77, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def _shared() -> Iterator[Any]:
    memory = weights(200)
    grid = weights(20, 20)
    array = np.zeros(100, dtype=np.float32)
    yield pytest.param(memory[:100], memory[50:150], id="shifted")
    yield pytest.param(grid[:10, ::2], grid[5:15, 1::2], id="strided")
    # Two storages of the same memory.
    yield pytest.param(torch.from_numpy(array), torch.from_numpy(array), id="numpy")


@pytest.mark.parametrize("argument", ["base", "delta"])
@pytest.mark.parametrize(("target", "other"), list(_shared()))
def test_memory_that_is_shared_is_named(target: Tensor, other: Tensor, argument: str) -> None:
    packed = random_packed(100)
    given = {"base": weights(*target.shape), "delta": weights(*target.shape, seed=1), argument: other}
    before = target.clone()
    with pytest.raises(ValueError, match=f"masked_switch_: target: must not share memory with {argument}"):
        taskloom.masked_switch_(target, given["base"], given["delta"], packed, ~packed)
    assert target.equal(before)


def test_neighbours_do_not_share_memory() -> None:
    memory = weights(300)
    target, base, delta = memory[:100], memory[100:200], memory[200:]
    packed = random_packed(100)
    taskloom.masked_switch_(target, base, delta, packed, ~packed)


def test_a_name_is_looked_up_once() -> None:
    assert taskloom.pack_mask is taskloom.ops.pack_mask
    assert vars(taskloom)["pack_mask"] is taskloom.ops.pack_mask


@pytest.mark.parametrize("wrong", [None, 3, [1.0], np.zeros(9, dtype=np.float32)])
def test_what_is_no_tensor_is_named(wrong: Any) -> None:
    kind = type(wrong).__name__
    a, packed = weights(9), random_packed(9)
    for call, name in (
        (lambda: taskloom.masked_update_(a, packed, wrong), "masked_update_: delta"),
        (lambda: taskloom.masked_update_(a, wrong, a), "masked_update_: mask"),
        (lambda: taskloom.masked_switch_(a, wrong, a, packed, packed), "masked_switch_: base"),
        (lambda: taskloom.masked_switch_(a, a, a, packed, wrong), "masked_switch_: new_packed"),
        (lambda: taskloom.task_mask(a, a, wrong), "task_mask: multi_task_vector"),
        (lambda: taskloom.multi_task_vector(a, [a, wrong]), r"multi_task_vector: tuned\[1\]"),
        (lambda: taskloom.sparse_merge(None, [a, wrong]), r"sparse_merge: tuned\[1\]"),
        (lambda: taskloom.mask_count([packed, wrong], 9, 1), r"mask_count: packed\[1\]"),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a tensor, got {kind}"):
            call()
