"""MaskedAdamW and MaskedSGD beside torch.optim, and as optimisers of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskloom
from taskloom.optim import MaskedAdamW, MaskedSGD

SHAPES = ((13, 79), (41,), (3, 5, 7))


def _seeded(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(_seeded(shape, place, dtype)) for place, shape in enumerate(SHAPES)]


def _masks(density: float = 0.3) -> list[Tensor]:
    return [_seeded(shape, 50 + place).abs() < density for place, shape in enumerate(SHAPES)]


def _train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 4, start: int = 0) -> None:
    for step in range(start, start + steps):
        for place, param in enumerate(params):
            param.grad = _seeded(tuple(param.shape), 100 + 10 * step + place, param.dtype)
        optimizer.step()


def _same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


PAIRS = [
    (MaskedAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (MaskedSGD, torch.optim.SGD, {"lr": 0.1}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_active_entries_follow_torch_and_others_keep_their_bits(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    own, other, masks = _params(), _params(), _masks()
    _train(ours(own, masks, **options), own)
    _train(theirs(other, **options), other)
    for param, expected, start, mask in zip(own, other, _params(), masks, strict=True):
        torch.testing.assert_close(param[mask], expected[mask], rtol=1e-6, atol=1e-6)
        assert torch.equal(param[~mask], start[~mask])


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_parameters_without_a_mask_train_whole(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    own, other = _params(), _params()
    _train(ours(own, **options), own)
    _train(theirs(other, **options), other)
    for param, expected in zip(own, other, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)


def test_every_form_of_a_mask_means_the_same() -> None:
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda mask: mask,
        taskloom.pack_mask,
        lambda mask: mask.flatten().nonzero().squeeze(1),
        lambda mask: mask.flatten().nonzero().squeeze(1).int(),
    ]
    results = []
    for form in forms:
        params = _params()
        optimizer = MaskedAdamW(params, [form(mask) for mask in _masks()])
        _train(optimizer, params)
        assert all(torch.equal(optimizer.get_mask(param), mask) for param, mask in zip(params, _masks(), strict=True))
        results.append(params)
    for other in results[1:]:
        _same(results[0], other)


def test_few_active_entries_are_kept_as_indices() -> None:
    param = nn.Parameter(torch.randn(1000))
    optimizer = MaskedAdamW([param], 0.01)
    assert optimizer.state[param]["active"].dtype == torch.int32
    assert int(optimizer.get_mask(param).sum()) == 10
    assert torch.equal(optimizer.get_mask(param), taskloom.magnitude_mask(param.detach(), density=0.01))


def test_masks_by_name_by_parameter_and_by_group() -> None:
    params, masks = _params(), _masks()
    named = [(f"p{place}", param) for place, param in enumerate(params)]
    by_name = MaskedAdamW(named, {"p1": masks[1]})
    by_parameter = MaskedAdamW(params, {params[1]: masks[1]})
    by_group = MaskedAdamW([{"params": params[:1]}, {"params": params[1:], "masks": [masks[1], None]}])
    for optimizer in (by_name, by_parameter, by_group):
        assert torch.equal(optimizer.get_mask(params[1]), masks[1])
        assert optimizer.get_mask(params[0]).all()
        assert "active" not in optimizer.state[params[2]]
    assert torch.equal(by_name.get_mask("p1"), masks[1])


def test_an_added_group_brings_masks_and_options() -> None:
    params, masks = _params(), _masks()
    optimizer = MaskedSGD(params[:1], masks[:1], lr=0.1)
    optimizer.add_param_group({"params": params[1:], "masks": masks[1:], "lr": 0.0})
    _train(optimizer, params)
    assert not torch.equal(params[0], _params()[0])
    _same(params[1:], _params()[1:])
    with pytest.raises(ValueError, match=r"masks\[0\]: expected shape \(3,\) as its parameter, got \(4,\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "masks": [torch.ones(4, dtype=torch.bool)]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedSGD])
def test_one_call_for_a_group_or_one_for_each_parameter(kind: Any) -> None:
    options = {"momentum": 0.9} if kind is MaskedSGD else {}
    together, apart = _params(), _params()
    _train(kind(together, _masks(), **options), together)
    _train(kind(apart, _masks(), foreach=False, **options), apart)
    _same(together, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedSGD])
def test_a_checkpoint_goes_on_bit_for_bit(kind: Any, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if kind is MaskedSGD else {}
    params = _params(dtype)
    optimizer = kind(params, _masks(), lr=0.05, **options)
    _train(optimizer, params)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    _train(optimizer, params, start=4)
    again = kind(weights, **options)
    again.load_state_dict(saved)
    for param in weights:
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert again.state[param]["momentum_buffer" if options else "exp_avg"].dtype == wanted
        assert again.state[param]["active"].dtype == torch.uint8
    _train(again, weights, start=4)
    _same(weights, params)
    assert again.param_groups[0]["lr"] == 0.05


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    params = _params()
    optimizer = MaskedAdamW(params, _masks())
    _train(optimizer, params)
    before, wrong = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    wrong["state"][1]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"state\[1\]: exp_avg: expected torch.float32 of shape \(\d+,\), one element for each active"):
        optimizer.load_state_dict(wrong)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_update_mask_keeps_the_state_of_entries_that_stay() -> None:
    (param,), (mask,) = _params()[:1], _masks()[:1]
    optimizer = MaskedAdamW([param], [mask])
    _train(optimizer, [param])
    dense = torch.zeros(param.shape)
    dense[mask] = optimizer.state[param]["exp_avg"]
    new = _seeded(tuple(param.shape), 7) > 0
    optimizer.update_mask(param, new)
    assert torch.equal(optimizer.state[param]["exp_avg"], dense[new])
    assert float(optimizer.state[param]["step"]) == 4
    start = param.detach().clone()
    _train(optimizer, [param])
    assert torch.equal(param[~new], start[~new])
    optimizer.update_mask(param, mask, state="reset")
    assert set(optimizer.state[param]) == {"active"}
    optimizer.update_mask(param, None)
    _train(optimizer, [param])
    assert optimizer.state[param]["exp_avg"].numel() == param.numel()


def test_closures_schedulers_and_a_tensor_for_a_learning_rate() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = MaskedSGD([param], [torch.tensor([True, False, True, False])], lr=torch.tensor(0.5))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    scheduler.step()
    optimizer.step(closure)
    assert torch.equal(param, torch.tensor([0.25, 1, 0.25, 1]))


def test_grad_scaler_unscales_and_skips() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = MaskedSGD([param], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, torch.inf):
        optimizer.zero_grad()
        scaler.scale((factor * param).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(param, torch.zeros(4))
    assert scaler.get_scale() == 4.0


def test_parameters_without_a_gradient_are_left_out() -> None:
    params = _params()
    optimizer = MaskedAdamW(params, _masks())
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    _same(params[1:], _params()[1:])
    assert "step" not in optimizer.state[params[1]]


def test_a_step_that_raises_counts_for_nothing() -> None:
    params = _params()
    optimizer = MaskedAdamW(params, _masks())
    _train(optimizer, params, steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    start = copy.deepcopy(params)
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(1)
    before["state"][2]["exp_avg"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="one for each active entry"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    _same(params, start)


def test_what_is_refused() -> None:
    param = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="amsgrad: MaskedAdamW does not offer it"):
        MaskedAdamW([param], amsgrad=True)
    with pytest.raises(ValueError, match="lr: expected a number that is not negative, got -1"):
        MaskedAdamW([param], lr=-1.0)
    with pytest.raises(ValueError, match=r"masks: expected 1, one for each parameter, got 2"):
        MaskedAdamW([param], [None, None])
    with pytest.raises(ValueError, match=r"is no parameter of this optimiser .names need"):
        MaskedAdamW([param], {"weight": 0.5})
    with pytest.raises(TypeError, match="masks: expected a mapping"):
        MaskedAdamW([param], torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"masks\[0\]: expected ascending indices"):
        MaskedAdamW([param], [torch.tensor([3, 1])])
    with pytest.raises(ValueError, match="nesterov: expected momentum"):
        MaskedSGD([param], nesterov=True)
    optimizer = MaskedAdamW([param])
    with pytest.raises(ValueError, match='state: expected "keep" or "reset"'):
        optimizer.update_mask(param, None, state="zero")
    with pytest.raises(ValueError, match="param: expected a parameter of this optimiser"):
        optimizer.update_mask(nn.Parameter(torch.zeros(4)), None)
