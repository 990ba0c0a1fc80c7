from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskloom.nn import KernelConfig, KernelLinear


def layer(kernel: str = "mixk", dtype: torch.dtype = torch.float32, **options: Any) -> KernelLinear:
    torch.manual_seed(0)
    return KernelLinear(nn.Linear(24, 40, dtype=dtype), kernel=kernel, **({"r": 8, "sparsity": 0.3, "gate": "hard"} | options))


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kernel", ["linear", "pwl", "sigmoid", "rbf", "mixk"])
def test_it_is_the_base_layer_plus_the_update(kernel: str) -> None:
    adapted, x = layer(kernel), inputs(2, 5)
    expected = adapted.base_layer(x) + x @ adapted.delta_weight().T
    assert torch.allclose(adapted(x), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merged_is_the_same_and_unmerge_restores_the_bits(dtype: torch.dtype) -> None:
    adapted, x = layer(dtype=dtype).eval(), inputs(3, dtype=dtype)
    before, y = adapted.weight.clone(), adapted(x)
    adapted.merge()
    assert adapted.merged
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    assert torch.allclose(adapted(x), y, atol=tolerance)
    assert not adapted.weight.equal(before)
    adapted.unmerge()
    assert not adapted.merged
    assert adapted.weight.equal(before)
    assert adapted(x).equal(y)


def test_factors_start_as_the_card_says() -> None:
    adapted = KernelLinear(nn.Linear(300, 500), r=32)
    for factor, rows in ((adapted.A, 300), (adapted.B, 500)):
        assert factor.shape == (2, rows, 16)
        bound = (rows * 16) ** -0.5
        assert 0.95 * bound < factor.abs().max() <= bound
    assert adapted.coef.tolist() == pytest.approx([0.1, -0.1])
    assert [adapted.alpha, adapted.gamma, adapted.beta] == [1.0, 1.0, 0.0]


def test_what_trains() -> None:
    adapted = layer()
    assert {name for name, one in adapted.named_parameters() if one.requires_grad} == {"A", "B", "alpha", "gamma", "beta"}
    assert {name for name, one in layer("pwl", learn_coef=True).named_parameters() if one.requires_grad} == {"A", "B", "coef"}
    adapted(inputs(4)).square().sum().backward()
    for name, one in adapted.named_parameters():
        assert (one.grad is not None) == one.requires_grad, name


def test_inputs_need_not_require_grad() -> None:
    # The official re-entrant checkpoint silently gives no gradient then.
    adapted = layer("pwl")
    adapted(inputs(4)).sum().backward()
    assert adapted.A.grad is not None
    assert adapted.A.grad.any()


def test_training_lowers_the_loss() -> None:
    adapted, x = layer(scale=1.0), inputs(64)
    target = x @ torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=3e-2, weight_decay=0)
    losses = []
    for _ in range(60):
        loss = (adapted(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_drop_path_leaves_the_branch_of_whole_samples_out() -> None:
    adapted, x = layer(drop_path=0.5), inputs(400, 3)
    base = adapted.base_layer(x)
    branch = (adapted(x) - base).detach()
    full = x @ adapted.delta_weight().detach().T
    dropped = branch.abs().amax((1, 2)) == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert torch.allclose(branch[~dropped], 2 * full[~dropped], atol=1e-5)


def test_dropout_is_of_the_branch_alone_and_in_training_alone() -> None:
    adapted, x = layer(dropout=0.5), inputs(6)
    assert not adapted(x).equal(adapted(x))
    adapted.eval()
    assert adapted(x).equal(adapted(x))
    with torch.no_grad():
        adapted.A.zero_()
        adapted.B.zero_()
        adapted.alpha.zero_()
    assert torch.allclose(adapted.train()(x), adapted.base_layer(x))


def test_sparsity_may_change() -> None:
    adapted = layer()
    shares = []
    for sparsity in (0.0, 0.5, 0.9):
        adapted.sparsity = sparsity
        shares.append(float((adapted.delta_weight() == 0).float().mean()))
    assert shares == pytest.approx([0, 0.5, 0.9], abs=2e-3)
    with pytest.raises(ValueError, match="KernelLinear: sparsity: expected a share from 0 to 1, got 2"):
        adapted.sparsity = 2


def test_adapter_state_goes_from_one_layer_to_another(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    trained, other = layer(sparsity=0.7), layer()
    with torch.no_grad():
        for one in trained.adapter_state_dict().values():
            one.add_(0.01)
    save_file({name: one.contiguous() for name, one in trained.adapter_state_dict().items()}, tmp_path / "adapter.safetensors")
    state = load_file(tmp_path / "adapter.safetensors")
    assert set(state) == {"A", "B", "coef", "alpha", "gamma", "beta", "sparsity"}
    other.load_adapter_state_dict(state)
    assert other.sparsity == trained.sparsity == 0.7
    assert other.delta_weight().equal(trained.delta_weight())


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    adapted = layer()
    before = adapted.delta_weight()
    state = {name: one.clone() + 1 for name, one in adapted.adapter_state_dict().items()}
    with pytest.raises(ValueError, match="state: expected A, B, alpha, beta, coef, gamma, sparsity, got A"):
        adapted.load_adapter_state_dict({"A": state["A"]})
    with pytest.raises(ValueError, match=r"state: B: expected shape \(2, 40, 4\), got \(2, 40, 3\)"):
        adapted.load_adapter_state_dict(state | {"B": state["B"][..., :3]})
    with pytest.raises(ValueError, match="sparsity"):
        adapted.load_adapter_state_dict(state)
    assert adapted.delta_weight().equal(before)


def test_whole_state_copies_and_moves() -> None:
    adapted = layer()
    adapted.sparsity = 0.7
    state = adapted.state_dict()
    assert set(state) == {"A", "B", "coef", "alpha", "gamma", "beta", "base_layer.weight", "base_layer.bias", "_extra_state"}
    other = layer()
    other.load_state_dict(state)
    assert other.sparsity == 0.7
    x = inputs(3)
    assert other(x).equal(adapted(x))
    adapted.eval().merge()
    moved = copy.deepcopy(adapted).double()
    moved.unmerge()
    assert moved.weight.equal(other.weight.double())


def test_merged_layers_refuse_what_would_be_lost() -> None:
    adapted = layer()
    with pytest.raises(RuntimeError, match="nothing is merged"):
        adapted.unmerge()
    adapted.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        adapted.merge()
    with pytest.raises(RuntimeError, match=r"cannot be trained; call unmerge\(\) or eval\(\)"):
        adapted(inputs(2))
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) before loading"):
        adapted.load_adapter_state_dict(adapted.adapter_state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 9}, ValueError, "r: expected a multiple of chunks, 2, got 9"),
        ({"r": 0}, ValueError, "r: expected at least 1, got 0"),
        ({"r": 8.0}, TypeError, "r: expected an integer, got float"),
        ({"chunks": 0}, ValueError, "chunks: expected at least 1, got 0"),
        ({"kernel": "poly"}, ValueError, "kernel: expected one of linear, pwl, sigmoid, rbf, mixk, got 'poly'"),
        ({"gate": "top"}, ValueError, "gate: expected one of magnitude, soft, hard or None, got 'top'"),
        ({"sparsity": -0.1}, ValueError, "sparsity: expected a share from 0 to 1, got -0.1"),
        ({"dropout": 1}, ValueError, "dropout: expected a probability from 0 to below 1, got 1"),
        ({"drop_path": -1}, ValueError, "drop_path: expected a probability from 0 to below 1, got -1"),
        ({"scale": 0}, ValueError, "scale: expected a finite number other than 0, got 0"),
        ({"rank": 8}, TypeError, "unexpected keyword argument 'rank'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(**options)


def test_only_linear_layers() -> None:
    with pytest.raises(TypeError, match=r"linear: expected nn\.Linear, got Conv2d"):
        KernelLinear.from_linear(nn.Conv2d(3, 3, 1), KernelConfig())


def test_from_linear_takes_a_configuration() -> None:
    adapted = KernelLinear.from_linear(nn.Linear(24, 40, bias=False), KernelConfig(r=6, chunks=3, kernel="pwl", gate=None))
    assert adapted.A.shape == (3, 24, 2)
    assert adapted(inputs()).shape == (40,)
    assert repr(adapted).startswith("KernelLinear(\n  r=6, kernel='pwl', chunks=3, sparsity=0.0, gate=None\n  (base_layer): Linear(")


def test_under_torch_compile() -> None:
    adapted, x = layer("pwl"), inputs(4)
    torch.compiler.reset()
    traced = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    adapted(x).sum().backward()
    expected, adapted.A.grad = adapted.A.grad, None
    traced(x).sum().backward()
    assert expected is not None
    assert adapted.A.grad is not None
    assert torch.allclose(adapted.A.grad, expected, rtol=1e-5)
    torch.compiler.reset()
