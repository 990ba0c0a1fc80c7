"""What is particular to kernel_merge, kernel_quantile and kernel_linear: the invariants of their methods' cards, memory, and bad input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_kernel_merge import factors, scalars
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

import taskloom
from taskloom.reference.lowrank.kernel_merge import KERNELS, gated, kernel_values

GATES = ("magnitude", "soft", "hard", None)
kernels = pytest.mark.parametrize("kernel", KERNELS)
native = pytest.mark.usefixtures("native_backend")


@pytest.fixture
def native_backend() -> Any:
    with taskloom.backend("native"):
        yield


def composed(A: Tensor, B: Tensor, coef: Tensor, kernel: str, sparsity: float, gate: str | None, **numbers: Tensor) -> Tensor:
    """The official form: cdist, softmax, quantile, gate; with the stop-gradient of its gate."""
    if kernel in ("pwl", "mixk"):
        values = sum(c * torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") for c, a, b in zip(coef, A, B, strict=True))
        if kernel == "mixk":
            values = values + numbers["alpha"] * torch.softmax(values / numbers["gamma"], 1) + numbers["beta"]
    else:
        values = kernel_values(A, B, coef, kernel, *(numbers.get(name) for name in ("alpha", "gamma", "beta")))
    assert isinstance(values, Tensor)
    if gate is None:
        return values.T
    magnitudes = values.detach().abs()
    if gate == "soft":
        ordered, rank = magnitudes.flatten().sort().values, math.ceil(sparsity * magnitudes.numel())
        return gated(values, ordered[rank - 1] if rank else ordered.new_zeros(()), gate).T
    threshold = torch.quantile(magnitudes.flatten(), sparsity)
    return (values * (magnitudes if gate == "magnitude" else 1) * (magnitudes > threshold)).T


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [one.detach().clone().requires_grad_() for one in tensors]


def relative(got: Tensor, expected: Tensor) -> float:
    wide = expected.detach().double()
    return float(torch.linalg.vector_norm(got.detach().double() - wide) / torch.linalg.vector_norm(wide).clamp(min=1e-300))


@native
@kernels
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("dtype", "value", "slope"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 2e-6, 2e-5)])
def test_fused_is_the_composition(kernel: str, gate: str | None, dtype: torch.dtype, value: float, slope: float) -> None:
    A, B, coef = factors(90, 75, width=4, dtype=dtype)
    numbers = scalars(kernel, dtype)
    mine, theirs = leaves(A, B, coef, *numbers.values()), leaves(*(one.double() for one in (A, B, coef, *numbers.values())))
    names = list(numbers)
    merged = taskloom.kernel_merge(*mine[:3], kernel=kernel, sparsity=0.613, gate=gate, **dict(zip(names, mine[3:], strict=True)))
    expected = composed(*theirs[:3], kernel, 0.613, gate, **dict(zip(names, theirs[3:], strict=True)))
    assert relative(merged, expected) <= value
    upstream = weights(75, 90, seed=9, dtype=dtype)
    merged.backward(upstream)
    expected.backward(upstream.double())
    for ours, wanted in zip(mine, theirs, strict=True):
        if kernel in ("sigmoid", "rbf") and ours is mine[2]:
            continue
        assert ours.grad is not None
        assert wanted.grad is not None
        assert relative(ours.grad, wanted.grad) <= slope


@native
def test_sixteen_bit_factors_are_near() -> None:
    A, B, coef = factors(90, 75, dtype=torch.bfloat16)
    merged = taskloom.kernel_merge(A, B, coef, sparsity=0.613)
    ones = {"alpha": torch.ones(()), "gamma": torch.ones(()), "beta": torch.zeros(())}
    assert relative(merged, composed(A.double(), B.double(), coef.double(), "mixk", 0.613, "magnitude", **ones)) <= 2e-2


@native
@kernels
def test_gradcheck(kernel: str) -> None:
    inputs = leaves(*factors(5, 7, width=3, dtype=torch.float64), *scalars(kernel, torch.float64).values())
    base = weights(7, 5, dtype=torch.float64).requires_grad_()

    def merged(base: Tensor, A: Tensor, B: Tensor, coef: Tensor, *numbers: Tensor) -> Tensor:
        named = dict(zip(("alpha", "gamma", "beta"), numbers, strict=False))
        return taskloom.kernel_merge(A, B, coef, kernel=kernel, gate=None, base=base, **named)

    if kernel in ("sigmoid", "rbf"):
        inputs[2].requires_grad_(False)
    assert torch.autograd.gradcheck(merged, (base, *inputs), eps=1e-6, atol=1e-6)


@native
def test_gradcheck_fails_for_the_gate_whose_factor_is_a_constant() -> None:
    inputs = leaves(*factors(5, 7, width=3, dtype=torch.float64))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda *given: taskloom.kernel_merge(*given, kernel="pwl", sparsity=0.3), inputs, eps=1e-6, atol=1e-6)


@native
def test_gradcheck_of_the_linear_layer() -> None:
    x, base, bias = (weights(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(((2, 3, 5), (7, 5), (7,))))
    inputs = leaves(x, base, bias, *factors(5, 7, width=3, dtype=torch.float64), *scalars("mixk", torch.float64).values())

    def layer(x: Tensor, base: Tensor, bias: Tensor, A: Tensor, B: Tensor, coef: Tensor, *numbers: Tensor) -> Tensor:
        named = dict(zip(("alpha", "gamma", "beta"), numbers, strict=True))
        return taskloom.kernel_linear(x, A, B, coef, gate=None, base=base, bias=bias, **named)

    assert torch.autograd.gradcheck(layer, inputs, eps=1e-6, atol=1e-6)


@native
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("n", "m"), [(37, 83), (300, 200)])
def test_as_many_are_kept_as_the_quantile_says(n: int, m: int, sparsity: float) -> None:
    A, B, coef = factors(n, m, dtype=torch.float64)
    values = kernel_values(A, B, coef, "pwl", None, None, None)
    kept = taskloom.kernel_merge(A, B, coef, kernel="pwl", sparsity=sparsity, gate="hard").T != 0
    assert int(kept.sum()) == n * m - 1 - math.floor(sparsity * (n * m - 1))
    if kept.any():
        assert values.abs()[kept].min() > values.abs()[~kept].max()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.8, 0.9, 0.999, 1.0])
def test_the_threshold_has_the_bits_of_torch_quantile(dtype: torch.dtype, sparsity: float) -> None:
    A, B, coef = factors(301, 503, dtype=dtype)
    values = taskloom.kernel_merge(A, B, coef, kernel="pwl", gate=None)
    threshold = taskloom.kernel_quantile(A, B, coef, kernel="pwl", sparsity=sparsity)
    expected = torch.quantile(values.abs().flatten(), sparsity)
    # The order statistics are exact; torch interpolates with or without a fused multiply-add, as the processor has it.
    assert abs(threshold - expected) <= torch.finfo(dtype).eps * expected
    ordered = values.abs().flatten().sort().values
    below = math.floor(float(torch.tensor(sparsity, dtype=dtype) * (len(ordered) - 1)))
    assert ordered[below] <= threshold <= ordered[min(below + 1, len(ordered) - 1)]


@native
def test_ties_at_the_threshold_are_all_dropped() -> None:
    A, B = torch.zeros(1, 3, 1), torch.tensor([[[1.0], [2.0], [2.0], [3.0]]])
    merged = taskloom.kernel_merge(A, B, torch.ones(1), kernel="pwl", sparsity=0.5, gate="hard")
    assert merged.tolist() == [[0.0] * 3, [0.0] * 3, [0.0] * 3, [3.0] * 3]
    assert float(taskloom.kernel_quantile(A, B, torch.ones(1), kernel="pwl", sparsity=0.5)) == 2


@native
@pytest.mark.parametrize("kernel", ["pwl", "mixk"])
def test_a_common_offset_changes_nothing(kernel: str) -> None:
    A, B, coef = factors(50, 60, dtype=torch.float64)
    offset = weights(2, 1, 4, seed=8, dtype=torch.float64)
    plain, moved = (taskloom.kernel_merge(a, b, coef, kernel=kernel, gate=None) for a, b in ((A, B), (A + offset, B + offset)))
    assert relative(moved, plain) <= 1e-12
    single = [one.float() for one in (A, B, coef, offset)]
    moved = taskloom.kernel_merge(single[0] + single[3], single[1] + single[3], single[2], kernel=kernel, gate=None)
    assert relative(moved, plain) <= 1e-5


@native
def test_a_large_offset_costs_no_accuracy() -> None:
    # With norms and products, 1e2 of offset would leave no digit of these distances.
    A, B, coef = factors(50, 60)
    near = [(1e-2 * one + 1e2).float() for one in (A, B)]
    expected = taskloom.kernel_merge(*(one.double() for one in near), coef.double(), kernel="pwl", gate=None)
    assert relative(taskloom.kernel_merge(*near, coef, kernel="pwl", gate=None), expected) <= 1e-6


@native
def test_pwl_is_homogeneous() -> None:
    A, B, coef = factors(50, 60, dtype=torch.float64)
    scaled = taskloom.kernel_merge(3.7 * A, 3.7 * B, coef, kernel="pwl", gate=None)
    assert relative(scaled, 3.7 * taskloom.kernel_merge(A, B, coef, kernel="pwl", gate=None)) <= 1e-12


@native
def test_distances_give_full_rank() -> None:
    A, B, coef = factors(64, 64, dtype=torch.float64)
    ranks = {kernel: int(torch.linalg.matrix_rank(taskloom.kernel_merge(A, B, coef, kernel=kernel, gate=None))) for kernel in KERNELS}
    assert ranks["linear"] == 8
    assert min(ranks["pwl"], ranks["mixk"]) > 48


@native
@pytest.mark.parametrize("kernel", ["pwl", "mixk", "rbf"])
@pytest.mark.parametrize("gate", GATES)
def test_coincident_rows_have_a_finite_gradient(kernel: str, gate: str | None) -> None:
    A, _, coef = factors(40, 40)
    inputs = leaves(A, A, coef)
    merged = taskloom.kernel_merge(*inputs, kernel=kernel, gate=gate, sparsity=0.3)
    merged.backward(weights(40, 40))
    assert merged.isfinite().all()
    for one in inputs:
        assert one.grad is not None
        assert one.grad.isfinite().all()


@native
def test_a_lone_coincident_pair_has_no_distance_gradient() -> None:
    A, B = leaves(torch.ones(2, 1, 3), torch.ones(2, 1, 3))
    taskloom.kernel_merge(A, B, torch.ones(2), kernel="pwl", gate=None).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert not A.grad.any()
    assert not B.grad.any()


@native
@pytest.mark.parametrize("gate", GATES)
def test_a_nan_is_not_hidden(gate: str | None) -> None:
    A, B, coef = factors(40, 50)
    A[0, 3, 1] = torch.nan
    merged = taskloom.kernel_merge(A, B, coef, kernel="pwl", gate=gate, sparsity=0.5)
    assert merged[:, 3].isnan().all()
    if gate is not None:
        assert taskloom.kernel_quantile(A, B, coef, kernel="pwl", gate=gate, sparsity=0.5).isnan()


@native
def test_data_at_odd_addresses() -> None:
    A, B, coef = factors(20, 30)
    base, x, bias = weights(30, 20), weights(3, 20), weights(30)

    def odd(tensor: Tensor) -> Tensor:
        held = bytearray(b"\0" + tensor.numpy().tobytes())
        return torch.frombuffer(held, dtype=tensor.dtype, offset=1).view(tensor.shape)

    plain, moved = ([how(one) for one in (A, B, coef, base, x, bias)] for how in (torch.clone, odd))
    found = []
    for a, b, c, w, rows, offset in (plain, moved):
        found.append(taskloom.kernel_merge(a, b, c, sparsity=0.3, base=w))
        found.append(taskloom.kernel_linear(rows, a, b, c, sparsity=0.3, base=w, bias=offset))
    assert_same_bits(found[0], found[2])
    assert_same_bits(found[1], found[3])


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that any op gave."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf.untyped_storage().data_ptr() for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, leaf.numel())
        return result


def saved_bytes(call: Callable[[], Tensor], *known: Tensor) -> tuple[Tensor, int]:
    """The result of a call, and the bytes that it keeps for the backward beside known tensors."""
    kept: dict[int, int] = {}
    own = {one.untyped_storage().data_ptr() for one in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(kept.values())


@native
@kernels
def test_nothing_of_the_size_of_a_weight_is_kept(kernel: str) -> None:
    n, m = 256, 192
    A, B, coef = leaves(*factors(n, m))
    base, x = weights(m, n), weights(4, n).requires_grad_()
    merged, kept = saved_bytes(lambda: taskloom.kernel_merge(A, B, coef, kernel=kernel, sparsity=0.5, base=base), A, B, coef, base)
    assert kept <= 16 * (n + m) + 1024
    y, kept = saved_bytes(lambda: taskloom.kernel_linear(x, A, B, coef, kernel=kernel, sparsity=0.5, base=base), A, B, coef, base, x)
    assert kept <= 16 * (n + m) + 1024
    with Largest() as largest:
        y.sum().backward()
    assert largest.entries < n * m
    with Largest() as largest:
        merged.backward(torch.ones(()).expand(m, n))
    assert largest.entries < n * m


@native
@kernels
@pytest.mark.usefixtures("restored_threads")
def test_gradients_have_the_same_bits_in_every_run(kernel: str) -> None:
    n, m = 333, 290
    upstream, found = weights(m, n, seed=9), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        inputs = leaves(*factors(n, m), *scalars(kernel).values())
        named = dict(zip(("alpha", "gamma", "beta"), inputs[3:], strict=False))
        taskloom.kernel_merge(*inputs[:3], kernel=kernel, sparsity=0.5, **named).backward(upstream)
        found.append([one.grad for one in inputs if one.grad is not None])
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            assert_same_bits(first, second)


@native
def test_the_exponential_is_within_two_units_of_the_last_place() -> None:
    # rbf with one column and a at 0 is exp(-beta b^2).
    roots = torch.linspace(0, 9.3, 20001)
    for beta in (1.0, -1.0):
        got = taskloom.kernel_merge(
            torch.zeros(1, 1, 1), roots[None, :, None], torch.ones(1), kernel="rbf", alpha=1.0, gamma=0.0, beta=beta, gate=None
        ).flatten()
        expected = (-beta * (roots * roots).double()).exp()
        ulp = torch.nextafter(expected.float(), torch.tensor(torch.inf)).double() - expected.float().double()
        assert ((got.double() - expected).abs() / ulp).max() <= 2
    wide = torch.linspace(0, 26, 5001, dtype=torch.float64)
    got = taskloom.kernel_merge(
        torch.zeros(1, 1, 1, dtype=torch.float64), wide[None, :, None], torch.ones(1), kernel="rbf", beta=1.0, gate=None
    ).flatten()
    assert torch.allclose(got, (-wide * wide).exp(), rtol=5e-16, atol=0)


@native
def test_exponentials_that_leave_the_range() -> None:
    B = torch.tensor([[[8.0], [30.0], [0.0]]])
    for beta, expected in ((2.0, [math.exp(-128), 0.0, 1.0]), (-2.0, [torch.inf, torch.inf, 1.0])):
        got = taskloom.kernel_merge(torch.zeros(1, 1, 1), B, torch.ones(1), kernel="rbf", beta=beta, gate=None).flatten()
        assert got.tolist() == pytest.approx(expected, abs=1e-38)


def test_numbers_are_as_exact_as_the_arithmetic() -> None:
    A, B, coef = factors(5, 7)
    x, base = weights(3, 5), weights(7, 5, seed=2)
    numbers = {"alpha": 0.3, "gamma": 0.7, "beta": 0.1}
    exact = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    for given in ((A.double(), B, coef), (A, B, coef.double())):
        assert_same_bits(taskloom.kernel_merge(*given, **numbers), taskloom.kernel_merge(*given, **exact))
    assert_same_bits(
        taskloom.kernel_merge(A, B, coef, base=base.double(), **numbers), taskloom.kernel_merge(A, B, coef, base=base.double(), **exact)
    )
    y = taskloom.kernel_linear(x.double(), A, B, coef, **numbers)
    assert_same_bits(y, taskloom.kernel_linear(x.double(), A, B, coef, **exact))
    with pytest.raises(ValueError, match="gamma: expected a value other than 0"):
        taskloom.kernel_merge(A, B, coef, gamma=1e-46)
    assert taskloom.kernel_merge(A.double(), B, coef, gamma=1e-46).isfinite().all()


@native
def test_autocast_casts_the_input_as_for_a_linear_layer() -> None:
    A, B, coef = factors(20, 30)
    x = weights(3, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = taskloom.kernel_linear(x, A, B, coef)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, taskloom.kernel_linear(x.bfloat16(), A, B, coef))


@native
def test_compiled_forward_and_backward() -> None:
    def loss(x: Tensor, A: Tensor, B: Tensor, coef: Tensor, gamma: Tensor, base: Tensor) -> Tensor:
        y = taskloom.kernel_linear(x, A, B, coef, gamma=gamma, sparsity=0.437, base=base)
        return y.square().sum() + taskloom.kernel_merge(A, B, coef, kernel="pwl", sparsity=0.2).sum()

    found = []
    for function in (loss, compiled(loss)):
        inputs = leaves(weights(3, 20), *factors(20, 30), torch.tensor(0.7))
        function(*inputs, weights(30, 20, seed=2)).backward()
        found.append([one.grad for one in inputs])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert relative(theirs, ours) <= 1e-6


def test_forward_mode_takes_the_reference() -> None:
    A, B, coef = factors(5, 7, dtype=torch.float64)
    tangent = torch.func.jvp(lambda a: taskloom.kernel_merge(a, B, coef, kernel="pwl", gate=None), (A,), (torch.ones_like(A),))[1]
    step = 1e-6
    ahead, behind = (taskloom.kernel_merge(A + sign * step, B, coef, kernel="pwl", gate=None) for sign in (1, -1))
    assert torch.allclose(tangent, (ahead - behind) / (2 * step), atol=1e-7)
    gammas = torch.tensor([0.5, 2.0], dtype=torch.float64)
    batch = torch.vmap(lambda gamma: taskloom.kernel_merge(A, B, coef, gamma=gamma, gate=None))(gammas)
    assert torch.allclose(batch[1], taskloom.kernel_merge(A, B, coef, gamma=2.0, gate=None))


@native
def test_double_backward_is_refused() -> None:
    A, B, coef = leaves(*factors(5, 7))
    (slope,) = torch.autograd.grad(taskloom.kernel_merge(A, B, coef, kernel="pwl", gate=None).sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="kernel_merge_backward has no gradient"):
        slope.sum().backward()


def bad_inputs() -> dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]]:
    """By name: arguments, the error, and what it says."""
    A, B, coef = good = factors(6, 5)
    shape, value = ValueError, ValueError
    return {
        "two dimensions": ((A[0], B, coef), {}, shape, r"A: expected shape \(chunks, n, width\), got \(6, 4\)"),
        "chunks": ((A, B[:1], coef), {}, shape, r"B: expected 2 chunks of width 4 as A, got shape \(1, 5, 4\)"),
        "width": ((A, B[..., :3], coef), {}, shape, "B: expected 2 chunks of width 4 as A"),
        "empty": ((A[..., :0], B[..., :0], coef), {}, shape, "A: expected at least one chunk of at least one column"),
        "coef": ((A, B, coef[:1]), {}, shape, r"coef: expected shape \(2,\), one value for each chunk, got \(1,\)"),
        "integers": ((A.int(), B, coef), {}, TypeError, "A: expected float32, bfloat16, float16 or float64, got torch.int32"),
        "coef a number": ((A, B, 0.1), {}, TypeError, "coef: expected a tensor, got float"),
        "sparsity": (good, {"sparsity": 1.5}, value, r"sparsity: expected a share from 0 to 1, got 1.5"),
        "nan": (good, {"sparsity": math.nan}, value, "sparsity: expected a share from 0 to 1, got nan"),
        "sparsity a text": (good, {"sparsity": "half"}, TypeError, "sparsity: expected a number, got str"),
        "kernel": (good, {"kernel": "poly"}, value, "kernel: expected one of linear, pwl, .*, got 'poly'"),
        "gate": (good, {"gate": "top"}, value, "gate: expected one of magnitude, soft, hard or None, got 'top'"),
        "gamma": (good, {"gamma": 0}, value, "gamma: expected a value other than 0"),
        "gamma tensor": (good, {"gamma": torch.zeros(())}, value, "gamma: expected a value other than 0"),
        "alpha": (good, {"alpha": torch.ones(2)}, shape, r"alpha: expected one value, got shape \(2,\)"),
        "text": (good, {"alpha": "1"}, TypeError, "alpha: expected a number or a tensor of one value, got str"),
        "no beta": (good, {"kernel": "pwl", "beta": 1.0}, value, "beta: the kernel pwl has no beta"),
        "device": ((A.to("meta"), B, coef), {}, value, "all tensors must be on one device, got (meta and cpu|cpu and meta)"),
    }


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), bad_inputs().values(), ids=bad_inputs())
def test_bad_input(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"kernel_merge: {message}"):
        taskloom.kernel_merge(*args, **kwargs)
    with pytest.raises(error, match=f"kernel_quantile: {message}"):
        taskloom.kernel_quantile(*args, **({"gate": "hard"} | kwargs))
    with pytest.raises(error, match=f"kernel_linear: {message}"):
        taskloom.kernel_linear(weights(2, 6), *args, **kwargs)


def test_bad_base_input_and_bias() -> None:
    A, B, coef = factors(6, 5)
    with pytest.raises(ValueError, match=r"kernel_merge: base: expected shape \(5, 6\), .*, got \(6, 5\)"):
        taskloom.kernel_merge(A, B, coef, base=weights(6, 5))
    with pytest.raises(ValueError, match=r"kernel_linear: x: expected a last dimension of 6, .*, got shape \(2, 5\)"):
        taskloom.kernel_linear(weights(2, 5), A, B, coef)
    with pytest.raises(ValueError, match=r"kernel_linear: bias: expected shape \(5,\), .*, got \(6,\)"):
        taskloom.kernel_linear(weights(2, 6), A, B, coef, bias=weights(6))
    with pytest.raises(ValueError, match="kernel_quantile: gate: expected magnitude, soft or hard, got None"):
        taskloom.kernel_quantile(A, B, coef, gate=None)


_PEAK = """
import sys, torch, taskloom
from pathlib import Path
def field(name):
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])
def merged(n, m):
    A, B = (torch.randn(2, rows, 16, requires_grad=True) for rows in (n, m))
    return taskloom.kernel_merge(A, B, torch.tensor([0.1, -0.1]), sparsity=0.9)
merged(64, 64).backward(torch.ones(64, 64))
upstream = torch.ones(()).expand(2048, 2048).contiguous()
Path("/proc/self/clear_refs").write_text("5")
before = field("VmRSS")
result = merged(2048, 2048)
forward = field("VmHWM") - before
result.backward(upstream)
print(forward / result.nbytes, (field("VmHWM") - before) / result.nbytes)
"""


@pytest.mark.slow
def test_memory_peaks_at_one_output() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], check=True, capture_output=True, text=True)
    forward, both = map(float, done.stdout.split())
    assert forward < 1.3
    assert both < 1.5


@native
@pytest.mark.slow
def test_more_entries_than_torch_quantile_takes() -> None:
    A, B, coef = factors(4099, 4111, chunks=1, width=1)
    values = taskloom.kernel_merge(A, B, coef, kernel="pwl", gate=None)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values.flatten(), 0.9)
    threshold = taskloom.kernel_quantile(A, B, coef, kernel="pwl", sparsity=0.9)
    rank = math.floor(0.9 * (values.numel() - 1))
    ordered = values.abs().flatten().sort().values
    assert ordered[rank] <= threshold <= ordered[rank + 1]
