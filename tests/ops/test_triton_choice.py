"""Where Triton kernels can serve and what is said where they cannot, without running one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import taskloom
from taskloom.ops import _triton
from taskloom.ops._backends import OPS, Op, _obstacle, kernels
from taskloom.ops._triton import triton_obstacle

INTERPRETED = "Triton's interpreter"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _triton._installed_obstacle.cache_clear()
    yield
    _triton._installed_obstacle.cache_clear()


def _gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_every_op_has_a_twin_of_the_same_schema() -> None:
    for name in OPS:
        native, twin = (getattr(ops, name).default._schema for ops in (torch.ops.taskloom, torch.ops.taskloom_triton))
        assert str(twin) == str(native).replace("taskloom::", "taskloom_triton::")
    assert kernels("triton") is torch.ops.taskloom_triton
    assert kernels("native") is torch.ops.taskloom


def test_a_gpu_takes_triton_where_there_is_no_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, (9, 0))
    op = Op("sparse_merge", frozenset({"cpu"}), "refuse")
    assert _obstacle(op, "native", torch.device("cuda")) is not None
    assert _obstacle(op, "triton", torch.device("cuda:0")) is None
    assert taskloom.explain("sparse_merge", device="cuda").chosen == "triton"


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, (7, 5))
    assert triton_obstacle("cuda:0") == "Triton kernels need compute capability 8.0, this GPU has 7.5"
    assert taskloom.explain("sparse_merge", device="cuda").chosen == "reference"


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, (9, 0))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert triton_obstacle("cuda") == "triton is not installed (pip install taskloom[triton])"


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.2.0")
    assert triton_obstacle("cuda") == "triton 3.2.0 is older than 3.5"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    assert triton_obstacle("cuda") == "torch sees no cuda device"


def test_other_devices_are_named() -> None:
    assert triton_obstacle("mps") == "there are no Triton kernels for mps tensors"
    assert INTERPRETED in str(triton_obstacle("cpu"))


def test_the_interpreter_serves_the_cpu_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert taskloom.explain("task_mask").chosen == "native"
    with taskloom.backend("triton"):
        assert taskloom.explain("task_mask").chosen == "triton"
    assert "runs kernels on the CPU" in str(triton_obstacle("cuda"))


def test_a_forced_backend_that_cannot_serve_changes_nothing() -> None:
    target = torch.ones(9)
    with taskloom.backend("triton"), pytest.raises(RuntimeError, match=r"masked_update_: backend 'triton' was asked for, but Triton kern"):
        taskloom.masked_update_(target, torch.ones(9, dtype=torch.bool), torch.ones(9))
    assert target.equal(torch.ones(9))


def test_a_twin_that_is_called_by_itself_on_the_cpu_says_what_it_needs() -> None:
    with pytest.raises(RuntimeError, match=r"run on the CPU only in Triton's interpreter: set TRITON_INTERPRET=1"):
        torch.ops.taskloom_triton.pack_mask.default(torch.ones(9, dtype=torch.bool))


def test_twins_have_fakes_and_bring_no_triton() -> None:
    script = (
        "import sys, torch, taskloom, taskloom.triton_kernels\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "taskloom.pack_mask\n"
        "with FakeTensorMode():\n"
        "    packed = torch.ops.taskloom_triton.pack_mask.default(torch.ones(17, dtype=torch.bool))\n"
        "print(tuple(packed.shape), packed.dtype, 'taskloom.triton_kernels.masked' in sys.modules)"
    )
    known: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "TASKLOOM_BACKEND"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", env=known, check=False)
    assert done.stdout.strip() == "(3,) torch.uint8 False", done.stderr
