"""Tasks of an archive in live modules: every bit of them, whatever the module held before, and modules that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tall_states import State, Toy, same, toy_models
from torch import Tensor, nn

from taskloom.methods.merging.tall_masks import TallArchive

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _state(module: nn.Module) -> State:
    return {name: values.clone() for name, values in module.state_dict().items() if not name.startswith("head")}


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_invariant_8_switching_there_and_back_restores_every_bit(dtype: torch.dtype) -> None:
    base, tuned = toy_models(3, dtype)
    archive = TallArchive.build(base, tuned)
    module = Toy(dtype)
    head = copy.deepcopy(module.head.state_dict())
    seen: dict[str, State] = {}
    for task in ("task-0", "task-1", "task-0", "task-2", "task-1", "task-2", "task-2", "task-0"):
        assert archive.apply_(module, task) is module
        assert same(_state(module), seen.setdefault(task, _state(module)))
        assert same({name: _state(module)[name] for name in base}, archive.state_dict(task))
    assert same(dict(module.head.state_dict()), dict(head))


def _step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _load(module: nn.Module) -> None:
    module.load_state_dict({name: torch.zeros_like(values) for name, values in module.state_dict().items()})


def _replace(module: nn.Module) -> None:
    assert isinstance(module, Toy)
    module.norm = nn.Parameter(torch.zeros(9))


def _give_memory(module: nn.Module) -> None:
    assert isinstance(module, Toy)
    module.norm.data = torch.zeros(9)


def _count_buffer(module: nn.Module) -> None:
    assert isinstance(module.position_ids, Tensor)
    module.position_ids.add_(1)


def _other_archive(module: nn.Module) -> None:
    base, tuned = toy_models(2)
    TallArchive.build(base, tuned, tall_mask_lambda=1.0).apply_(module, "task-1")


def _poke(module: nn.Module) -> None:
    # What is done through .data torch does not count, nor what a fused optimizer does.
    for parameter in module.parameters():
        parameter.data.fill_(7)


def _step_fused(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _round(module: nn.Module) -> None:
    module.to(BF16).to(F32)


@pytest.mark.parametrize("change", [_step, _step_fused, _load, _replace, _give_memory, _count_buffer, _other_archive, _poke, _round])
@pytest.mark.parametrize("task", ["task-0", "task-1"])
def test_nothing_done_in_between_remains(change: Any, task: str) -> None:
    base, tuned = toy_models(2)
    archive = TallArchive.build(base, tuned)
    module = archive.apply_(Toy(), "task-0")
    change(module)
    archive.apply_(module, task)
    assert same({name: _state(module)[name] for name in base}, archive.state_dict(task))


def test_inference_tensors() -> None:
    base, tuned = toy_models(2)
    archive = TallArchive.build(base, tuned)
    with torch.inference_mode():
        frozen = Toy()
        for task in ("task-0", "task-1", "task-0"):
            archive.apply_(frozen, task)
            assert same({name: _state(frozen)[name] for name in base}, archive.state_dict(task))


def test_a_module_of_another_dtype_strides_and_tied_weights() -> None:
    base, tuned = toy_models(2)
    archive = TallArchive.build(base, tuned)
    module = Toy(BF16)
    module.embed.weight = nn.Parameter(torch.empty(5, 13, dtype=BF16).T)
    for task in ("task-0", "task-1", "task-0"):
        archive.apply_(module, task)
        for name, values in archive.state_dict(task).items():
            assert torch.equal(module.state_dict()[name], values.to(BF16) if values.is_floating_point() else values)
    assert module.embed.weight.stride() == (1, 13)

    tied = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    models = {"one": copy.deepcopy(tied), "two": copy.deepcopy(tied)}
    for seed, model in enumerate(models.values()):
        nn.init.normal_(next(model.parameters()), generator=torch.Generator().manual_seed(seed))
    both = TallArchive.build(tied, models, method="ties", trim=1.0)
    for task in ("one", "two", "one"):
        both.apply_(tied, task)
        assert same(_state(tied), both.state_dict(task))


def test_recomputed_buffers_may_be_missing() -> None:
    base, tuned = toy_models(2)
    computed = {"layers.0.rotary_emb.inv_freq": torch.ones(4)}
    archive = TallArchive.build(base | computed, tuned)
    module = archive.apply_(Toy(), "task-1")
    assert same({name: _state(module)[name] for name in base} | computed, archive.state_dict("task-1"))


def test_bad_modules_stay_as_they_were() -> None:
    base, tuned = toy_models(2)
    archive = TallArchive.build(base, tuned)
    cases: list[tuple[Any, type[Exception], str]] = [
        (nn.Linear(2, 2), KeyError, "apply_: module: expected the archive's tensors; it lacks 'embed.weight', 'norm', 'scale' and 1 more"),
        (Toy().to("meta"), ValueError, "'embed.weight': expected it on cpu as the archive, got meta"),
    ]
    narrow, whole = Toy(), Toy()
    narrow.norm = nn.Parameter(torch.zeros(3))
    whole.norm = nn.Parameter(torch.zeros(9, dtype=torch.int64), requires_grad=False)
    cases.append((narrow, ValueError, r"'norm': expected shape \(9,\), got \(3,\)"))
    cases.append((whole, TypeError, r"'norm': expected floating point, got torch.int64"))
    small, expanded, aliased = Toy(), Toy(), Toy()
    small.register_buffer("position_ids", torch.zeros(6, dtype=torch.uint8))
    expanded.norm = nn.Parameter(torch.zeros(1).expand(9))
    aliased.load_state_dict({**aliased.state_dict(), **archive.base}, assign=True)
    cases.append((small, TypeError, "'position_ids': expected torch.int64, got torch.uint8"))
    cases.append((expanded, ValueError, "'norm': expected a tensor that can be written to"))
    cases.append((aliased, ValueError, "'embed.weight': is the archive's own memory"))
    half = Toy(F16)
    large = {name: values * 1e6 if values.is_floating_point() else values for name, values in base.items()}
    with pytest.raises(ValueError, match=r"tensor 'embed.weight': base \+ vector overflows torch\.float16"):
        TallArchive.build(large, {"task-0": large}).apply_(half, "task-0")
    assert all(values.isfinite().all() for values in half.state_dict().values())
    tensors: Any = base
    cases.append((tensors, TypeError, "module: expected an nn.Module, got dict"))
    for module, error, message in cases:
        state = module.state_dict() if isinstance(module, nn.Module) else module
        before = {name: values.clone() for name, values in state.items()}
        with pytest.raises(error, match=message):
            archive.apply_(module, "task-0")
        assert all(values.is_meta or torch.equal(values, before[name]) for name, values in state.items())
    for call in (lambda: archive.apply_(Toy(), "task-9"), lambda: archive.state_dict("task-9")):
        with pytest.raises(KeyError, match="has no task 'task-9'; its tasks are task-0, task-1; did you mean 'task-"):
            call()


def test_tied_weights_of_which_the_archive_has_two() -> None:
    first, second = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    tied = nn.ModuleDict({"a": first, "b": second})
    tuned = {"one": {name: values + torch.randn_like(values) for name, values in _state(tied).items()}}
    archive = TallArchive.build(tied, tuned)
    second.weight = first.weight
    before = first.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'a\.weight' and 'b\.weight' are one tensor, of which the archive has two different ones"):
        archive.apply_(tied, "one")
    assert torch.equal(first.weight, before)
