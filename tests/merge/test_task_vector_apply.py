"""What task vectors are applied to: tied and strided tensors, mixed dtypes, modules, devices; exactness of the inverse."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from taskloom import TaskVector

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tied(nn.Module):
    """An embedding and a head of one weight, and buffers of each kind."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.head = nn.Linear(5, 11, bias=False)
        if tie:
            self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("count", torch.tensor(3))


def _changed(model: nn.Module, by: float = 0.5) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(by)
    return made


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
def test_alpha_one_gives_the_fine_tuned_weights_back(base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(37, 3, generator=random).to(base_dtype)}
    tuned = {"w": (base["w"].double() + 0.01 * torch.randn(37, 3, generator=random, dtype=torch.float64)).to(tuned_dtype)}
    tau = TaskVector(base, tuned)
    wide = torch.float64 if torch.float64 in (base_dtype, tuned_dtype) else torch.float32
    assert tau.dtype == wide
    assert torch.equal(tau["w"], tuned["w"].to(wide) - base["w"].to(wide))
    back = tau.apply_to(base)["w"]
    assert back.dtype == base_dtype
    epsilon = torch.finfo(base_dtype).eps
    torch.testing.assert_close(back.double(), tuned["w"].double(), rtol=epsilon, atol=epsilon)
    if base_dtype == tuned_dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(back, tuned["w"])


def test_strided_tensors() -> None:
    random = torch.Generator().manual_seed(1)
    whole = torch.randn(8, 9, 10, generator=random)
    base = {
        "t": whole[0].t(),
        "sliced": whole[1:3, ::2, 1:7],
        "expanded": whole[0, 0, :1].expand(4, 3),
        "negative": whole[3].flip(0).t()[::3],
    }
    tuned = {name: (tensor * 2).clone() for name, tensor in base.items()}
    tau = TaskVector(base, tuned)
    made = (2 * tau).apply_to(base, 0.5)
    for name, tensor in made.items():
        assert torch.equal(tau[name], tuned[name] - base[name])
        torch.testing.assert_close(tensor, tuned[name])
        assert tensor.is_contiguous()
    assert torch.equal(TaskVector.from_deltas(base)["t"], base["t"])
    linear = nn.Linear(9, 10, bias=False)
    linear.weight = nn.Parameter(whole[5].t())
    assert not linear.weight.is_contiguous()
    expected = linear.weight.detach() + base["t"]
    TaskVector.from_deltas({"weight": base["t"]}).apply_to_(linear)
    assert torch.equal(linear.weight, expected)


def test_tied_weights_move_once() -> None:
    model = Tied()
    tau = TaskVector(model, _changed(model))
    assert set(tau) == {"embed.weight", "head.weight", "mean"}
    assert tau["embed.weight"].data_ptr() == tau["head.weight"].data_ptr()
    assert tau.norm() == pytest.approx((2 * 55 * 0.25) ** 0.5)
    before = model.embed.weight.detach().clone()
    changed = tau.apply_to(model)
    assert changed.head.weight is changed.embed.weight
    torch.testing.assert_close(changed.embed.weight.detach(), before + 0.5)
    made = tau.apply_to(dict(model.state_dict()))
    assert made["head.weight"] is made["embed.weight"]
    given = TaskVector.from_deltas(dict.fromkeys(("embed.weight", "head.weight"), before))
    for tied in (given, 2 * given, (2 * given).materialize(), given.to(dtype=torch.float64), 0 * given):
        tensors = tied.tensors()
        assert (tensors["head.weight"] is tensors["embed.weight"]) == (tied.norm() > 0)
    only = TaskVector.from_deltas({"embed.weight": torch.ones(11, 5)})
    torch.testing.assert_close(only.apply_to(model.state_dict())["head.weight"], before + 1)


def test_one_tensor_with_two_deltas() -> None:
    model = Tied()
    tau = TaskVector.from_deltas({"embed.weight": torch.ones(11, 5), "head.weight": torch.zeros(11, 5)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'head.weight' and 'embed.weight' are one tensor of Tied, but the vector has different deltas"):
        tau.apply_to_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # A state dict can hold what the vector says.
    made = tau.apply_to(model.state_dict())
    torch.testing.assert_close(made["embed.weight"], before["embed.weight"] + 1)
    assert torch.equal(made["head.weight"], before["head.weight"])


def test_modules_of_every_kind() -> None:
    model = Tied(tie=False).double()
    tau = TaskVector(model, _changed(model).state_dict())
    assert tau.dtype == torch.float64
    assert "scratch" not in tau
    changed = tau.apply_to(model, 2)
    assert isinstance(changed, Tied)
    torch.testing.assert_close(changed.head.weight, model.head.weight + 1)
    assert int(changed.count) == 3
    with_scratch = TaskVector.from_deltas({"scratch": torch.ones(3)}).apply_to(model)
    assert torch.equal(with_scratch.scratch, torch.full((3,), 2.0, dtype=torch.float64))
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="'weight' of base: is not initialised yet"):
        TaskVector(lazy, lazy)
    with pytest.raises(ValueError, match="'weight' of LazyLinear: is not initialised yet"):
        TaskVector.from_deltas({"weight": torch.ones(2)}).apply_to_(lazy)


def test_gradients_stay_out() -> None:
    base = {"w": torch.ones(3, requires_grad=True)}
    tuned = {"w": (base["w"] * 2).requires_grad_()}
    tau = TaskVector(base, tuned)
    made = tau.apply_to(base)["w"]
    assert not tau["w"].requires_grad
    assert not made.requires_grad
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    TaskVector(model, _changed(model)).apply_to_(model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.weight.grad is not None


def test_what_cannot_be_applied_to() -> None:
    tau = TaskVector.from_deltas({"w": torch.ones(3)})
    for target, kind, words in (
        ({"v": torch.ones(3)}, KeyError, "the state dict lacks 'w'"),
        ({"w": torch.ones(2)}, ValueError, r"'w' of the state dict: has shape \(2,\), expected \(3,\)"),
        ({"w": torch.ones(3, dtype=torch.int32)}, TypeError, "is torch.int32, expected floating point"),
        ({"w": torch.ones(3, device="meta")}, ValueError, "got one on meta"),
        ({"w": TwoTensor(torch.ones(3), torch.ones(3))}, ValueError, "expected a plain tensor, got a TwoTensor"),
        ({"w": torch.ones(3).to_sparse()}, ValueError, "expected a dense tensor, got torch.sparse_coo"),
        ({"w": torch.tensor([1.0, float("nan"), 1.0])}, ValueError, "of the target: holds nan at entry 1"),
        ({"w": torch.full((3,), 65504.0, dtype=torch.float16), "n": 3}, TypeError, "'n': expected a tensor, got int"),
        ([torch.ones(3)], TypeError, "expected a state dict or an nn.Module, got list"),
        (tau, TypeError, "got a task vector; add vectors with"),
    ):
        with pytest.raises(kind, match=words):
            tau.apply_to(target)
    with pytest.raises(ValueError, match=r"overflows torch\.float16 at entry 0"):
        (1000 * tau).apply_to({"w": torch.full((3,), 65504.0, dtype=torch.float16)})
    with pytest.raises(ValueError, match=r"the coefficients .* overflow float32"):
        (1e300 * tau).apply_to({"w": torch.ones(3)})
    with pytest.raises(TypeError, match=r"apply_to_: expected an nn\.Module, got dict"):
        tau.apply_to_({"w": torch.ones(3)})
    for alpha, kind in (("1", TypeError), (True, TypeError), (float("inf"), ValueError)):
        with pytest.raises(kind, match="alpha"):
            tau.apply_to({"w": torch.ones(3)}, alpha)
    with pytest.raises(TypeError, match="finetuned: expected a model's weights, got a task vector"):
        TaskVector({"w": torch.ones(3)}, tau)


def test_other_tensors_of_the_target_are_kept() -> None:
    tau = TaskVector.from_deltas({"w": torch.ones(3)})
    sparse, quantities = torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64)
    shared = torch.arange(4)
    both = TwoTensor(torch.ones(2), torch.zeros(2))
    made = tau.apply_to({"s": sparse, "w": torch.zeros(3), "q": quantities, "i": shared, "j": shared, "e": torch.empty(0), "b": both})
    assert list(made) == ["s", "w", "q", "i", "j", "e", "b"]
    assert isinstance(made["b"], TwoTensor)
    assert torch.equal(made["s"].to_dense(), torch.eye(3))
    assert made["i"] is made["j"]
    assert made["i"].data_ptr() != shared.data_ptr()


def test_default_device_and_inference_mode(tmp_path: Path) -> None:
    base, tuned = {"w": torch.zeros(5)}, {"w": torch.arange(5.0)}
    TaskVector(base, tuned).save(tmp_path / "tau.safetensors")
    with torch.device("meta"):
        loaded = TaskVector.load(tmp_path / "tau.safetensors")
        made = (2 * loaded).apply_to(base)
        assert (2 * loaded - loaded).norm() == pytest.approx(30**0.5)
    assert torch.equal(made["w"], 2 * tuned["w"])
    with torch.inference_mode():
        assert TaskVector(base, tuned).norm() == pytest.approx(30**0.5)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = Tied().cuda()
    tau = TaskVector(model, _changed(model))
    assert tau["mean"].is_cuda
    on_cpu = tau.to(device="cpu")
    assert on_cpu.norm() == pytest.approx(tau.norm())
    for vector in (tau, on_cpu):
        changed = vector.apply_to(model, -1)
        torch.testing.assert_close(changed.embed.weight, model.embed.weight - 0.5)
        assert changed.embed.weight.is_cuda
    with pytest.raises(ValueError, match="is on cpu in the second vector, expected cuda:0"):
        tau + on_cpu
    with pytest.raises(ValueError, match="is on cpu in finetuned, expected cuda:0 as in base"):
        TaskVector(model, _changed(model).cpu())
