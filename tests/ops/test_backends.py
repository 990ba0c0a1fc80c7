"""How the implementation of an op is chosen, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import taskloom
from taskloom import _native, reference
from taskloom.ops import _backends, _library
from taskloom.ops._backends import active_transform, choose, requested_backend

MASK = torch.tensor([True, False, True, True, False, False, False, True, True])


@pytest.fixture(autouse=True)
def automatic() -> Any:
    with taskloom.backend("auto"):
        yield


def _run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"} | variables
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", env=environment, check=False)


def test_the_innermost_block_holds() -> None:
    with taskloom.backend("native"):
        with taskloom.backend("reference"):
            assert choose("pack_mask", MASK) == "reference"
        assert choose("pack_mask", MASK) == "native"
    assert requested_backend() == "auto"


def test_an_error_restores_what_held_before() -> None:
    with pytest.raises(KeyError), taskloom.backend("reference"):
        raise KeyError
    assert requested_backend() == "auto"


def test_backend_decorates_a_function() -> None:
    @taskloom.backend("reference")
    def requested() -> str:
        return requested_backend()

    assert (requested(), requested(), requested_backend()) == ("reference", "reference", "auto")


def test_backend_holds_in_other_threads() -> None:
    seen = []
    with taskloom.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose("pack_mask", MASK)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["cuda", "Native", "", "nativ"])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, native, triton, reference, got"), taskloom.backend(name):
        pass
    assert requested_backend() == "auto"


@pytest.mark.parametrize("name", ["native", "reference"])
def test_variable_sets_the_backend(name: str) -> None:
    done = _run("from taskloom.ops._backends import requested_backend; print(requested_backend())", TASKLOOM_BACKEND=name)
    assert done.stdout.strip() == name, done.stderr


def test_empty_variable_is_automatic() -> None:
    done = _run("from taskloom.ops._backends import requested_backend; print(requested_backend())", TASKLOOM_BACKEND="")
    assert done.stdout.strip() == "auto", done.stderr


def test_wrong_variable_is_an_error_that_names_it() -> None:
    done = _run("import taskloom; taskloom.pack_mask", TASKLOOM_BACKEND="cudnn")
    assert done.returncode == 1
    assert "ValueError: TASKLOOM_BACKEND: expected one of auto, native, triton, reference, got 'cudnn'" in done.stderr


def test_forced_triton_raises_with_the_reason() -> None:
    with (
        taskloom.backend("triton"),
        pytest.raises(RuntimeError, match=r"pack_mask: backend 'triton' was asked for, but Triton kernels run on GPUs"),
    ):
        taskloom.pack_mask(MASK)


def test_forced_native_raises_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backends.OPS, "pack_mask", _backends.Op("pack_mask", frozenset(), "reference"))
    assert choose("pack_mask", MASK) == "reference"
    with taskloom.backend("native"), pytest.raises(RuntimeError, match="no native kernel for cpu tensors"):
        taskloom.pack_mask(MASK)


def test_native_and_reference_run_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = reference.masked.pack_mask
    monkeypatch.setattr(reference.masked, "pack_mask", lambda mask: calls.append("reference") or original(mask))
    native = taskloom.pack_mask(MASK)
    assert calls == []
    with taskloom.backend("reference"):
        assert taskloom.pack_mask(MASK).equal(native)
    assert calls == ["reference"]


def test_explain_on_the_cpu() -> None:
    shown = taskloom.explain("pack_mask", MASK)
    assert (shown.op, shown.requested, shown.device, shown.chosen) == ("pack_mask", "auto", "cpu", "native")
    assert shown.obstacles["native"] is None
    assert shown.obstacles["reference"] is None
    assert "Triton kernels run on GPUs" in str(shown.obstacles["triton"])
    assert taskloom.explain("pack_mask") == shown
    lines = str(shown).splitlines()
    assert lines[0] == "pack_mask on cpu (backend 'auto'): native"
    assert [line.split()[0] for line in lines[1:]] == ["native", "triton", "reference"]


@pytest.mark.skipif(_library.CUDA.loaded, reason="the CUDA library is loaded")
def test_explain_on_cuda_says_why_the_library_is_not_loaded() -> None:
    shown = taskloom.explain("pack_mask", device="cuda")
    assert shown.chosen == "reference"
    assert _library.CUDA.reason in str(shown.obstacles["native"])


def test_explain_takes_a_device_with_its_index() -> None:
    for index in ("cpu:0", "cuda:1"):
        assert taskloom.explain("pack_mask", device=index) == taskloom.explain("pack_mask", device=index.partition(":")[0])


def test_explain_on_meta() -> None:
    assert taskloom.explain("pack_mask", MASK.to("meta")).chosen == "native"
    assert taskloom.pack_mask(MASK.to("meta")).shape == (2,)


def test_explain_says_when_a_forced_backend_cannot_serve() -> None:
    with taskloom.backend("triton"):
        shown = taskloom.explain("pack_mask", MASK)
    assert shown.chosen is None
    assert str(shown).startswith("pack_mask on cpu (backend 'triton'): none, it raises")


def test_explain_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"op: 'pack_masks' is unknown, .*; did you mean 'pack_mask'\?"):
        taskloom.explain("pack_masks")
    with pytest.raises(ValueError, match=r"is unknown, the ops are .*unpack_mask, weighted_ce, weighted_ce_backward, "):
        taskloom.explain("zzz")


def test_mixed_devices() -> None:
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu and meta"):
        choose("pack_mask", MASK, MASK.to("meta"))
    with pytest.raises(ValueError, match="pack_mask: all tensors must be on one device"):
        taskloom.explain("pack_mask", MASK, MASK.to("meta"))


def _selected(values: Tensor) -> Tensor:
    return values * taskloom.unpack_mask(taskloom.pack_mask(values > 0), values.shape)


def _jvp(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    tangent: Tensor = torch.func.jvp(function, (values,), (torch.ones_like(values),))[1]
    return tangent


def _forward_ad(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(values, torch.ones_like(values)))).tangent
    assert tangent is not None
    return tangent


def _gradient(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    gradient: Tensor = torch.func.grad(lambda point: function(point).sum())(values)
    return gradient


@pytest.mark.parametrize("derivative", [_jvp, _forward_ad, _gradient])
def test_discrete_ops_work_under_derivatives(derivative: Callable[..., Tensor]) -> None:
    values = torch.linspace(-1, 1, 11)
    assert derivative(_selected, values).equal((values > 0).float())


def test_discrete_ops_work_under_vmap() -> None:
    masks = torch.stack([MASK, ~MASK, torch.zeros_like(MASK)])
    packed = torch.func.vmap(taskloom.pack_mask)(masks)
    assert packed.equal(torch.stack([taskloom.pack_mask(mask) for mask in masks]))
    assert torch.func.vmap(lambda bits: taskloom.unpack_mask(bits, MASK.shape))(packed).equal(masks)


def test_a_transform_takes_the_reference_and_refuses_a_forced_backend() -> None:
    chosen: list[str] = []

    def note(values: Tensor) -> Tensor:
        chosen.append(choose("pack_mask", values > 0))
        return values

    torch.func.vmap(note)(torch.ones(2, 3))
    assert chosen == ["reference"]
    with taskloom.backend("native"), pytest.raises(RuntimeError, match=r"backend 'native' cannot serve under torch\.func's vmap"):
        torch.func.vmap(taskloom.pack_mask)(torch.stack([MASK, MASK]))
    with taskloom.backend("reference"):
        torch.func.vmap(taskloom.pack_mask)(torch.stack([MASK, MASK]))


def test_an_op_without_derivative_refuses_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backends.OPS, "pack_mask", _backends.Op("pack_mask", frozenset({"cpu"}), "refuse"))
    with pytest.raises(RuntimeError, match=r"pack_mask does not work under torch\.func's vmap transform"):
        torch.func.vmap(taskloom.pack_mask)(torch.stack([MASK, MASK]))


def test_transforms_have_names() -> None:
    names: list[str | None] = []

    def note(values: Tensor) -> Tensor:
        names.append(active_transform())
        return values.sum()

    values = torch.ones(2, 3)
    note(values)
    torch.func.vmap(note)(values)
    torch.func.grad(note)(values)
    torch.func.jvp(note, (values,), (values,))
    with forward_ad.dual_level():
        note(values)
    assert names == [None, *(f"torch.func's {name} transform" for name in ("vmap", "grad", "jvp")), "forward-mode AD"]


def test_a_compiled_function_follows_the_backend() -> None:
    graphs: list[str] = []

    def record(module: torch.fx.GraphModule, _inputs: Any) -> Any:
        targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        graphs.append("native" if targets == ["taskloom.pack_mask.default"] else "reference")
        return module.forward

    compiled = torch.compile(taskloom.pack_mask, backend=record, fullgraph=True)
    for name in ("native", "reference", "native", "reference"):
        with taskloom.backend(name):
            assert compiled(MASK).equal(torch.tensor([0b10001101, 1], dtype=torch.uint8))
    assert graphs == ["native", "reference"]


@pytest.mark.parametrize("derivative", [_jvp, _forward_ad, _gradient])
def test_a_compiled_function_is_right_under_transforms(derivative: Callable[..., Tensor]) -> None:
    compiled = torch.compile(_selected, backend="eager")
    values = torch.linspace(-1, 1, 11)
    compiled(values)
    assert derivative(compiled, values).equal((values > 0).float())


@pytest.mark.parametrize("size", [9, (1 << 19) + 1], ids=["one thread", "many threads"])
def test_wrong_cpu_level_is_named_by_ops(size: int) -> None:
    script = f"import torch, taskloom; taskloom.pack_mask(torch.ones({size}, dtype=torch.bool))"
    done = _run(script, TASKLOOM_CPU_LEVEL="v9")
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: TASKLOOM_CPU_LEVEL: expected one of" in done.stderr
    assert "got 'v9'" in done.stderr


def test_wrong_cpu_level_is_named_by_the_executor() -> None:
    done = _run("from taskloom import _native; _native.cpu_level()", TASKLOOM_CPU_LEVEL="v9")
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: TASKLOOM_CPU_LEVEL: expected one of" in done.stderr


OPS_LEVEL = "import torch, taskloom; print(taskloom.pack_mask(torch.ones(9, dtype=torch.bool)).tolist()); "
OPS_LEVEL += "from taskloom.ops import _library; print(_library.cpu_level())"


@pytest.mark.parametrize("level", [level for level in _native.build_info()["levels"] if level <= _native.detected_cpu_level()])
def test_variable_sets_the_cpu_level(level: str) -> None:
    done = _run(OPS_LEVEL + "; from taskloom import _native; print(_native.cpu_level())", TASKLOOM_CPU_LEVEL=level)
    assert done.stdout.split("\n")[:3] == ["[255, 1]", level, level], done.stderr


@pytest.mark.usefixtures("restored_level")
def test_force_cpu_level() -> None:
    _library.force_cpu_level(_native.build_info()["levels"][0])
    assert _library.cpu_level() == _native.build_info()["levels"][0]
    with pytest.raises(ValueError, match="cpu level: 'v9' is not a level"):
        _library.force_cpu_level("v9")
    assert _library.cpu_level() == _native.build_info()["levels"][0]
    _library.force_cpu_level("")
    assert _library.cpu_level() == _native.detected_cpu_level()


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((9, 0), ["80", "90"], True),
        ((7, 5), ["80", "90"], False),
        ((8, 6), ["80", "90"], True),
        ((12, 0), ["80", "90"], True),
        ((12, 0), ["90-real"], False),
        ((8, 0), ["90-real"], False),
        ((8, 9), ["80-real", "86-real"], True),
        ((10, 0), ["90-virtual"], True),
        ((9, 0), ["90a"], True),
        ((10, 0), ["90a"], False),
        ((10, 3), ["100a"], False),
    ],
)
def test_the_cuda_library_serves_gpus_that_it_has_code_for(capability: tuple[int, int], architectures: list[str], served: bool) -> None:
    obstacle = _library.architecture_obstacle(capability, architectures)
    assert (obstacle is None) == served
    if obstacle is not None:
        assert f"this GPU has {capability[0]}.{capability[1]}" in obstacle
