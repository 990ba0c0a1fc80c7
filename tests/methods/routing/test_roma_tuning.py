"""RoMA's reference set from a model, and tuning: what changes, what repeats, and what lam = 0 is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from moe_models import tiny_model, tiny_tokens
from taskloom.methods.routing.roma import (
    Neighbors,
    ReferenceSet,
    RoMAConfig,
    RoutingRecorder,
    build_reference,
    manifold_loss,
    neighbor_weights,
    refresh_reference,
    train_only_routers,
    tune_routers,
)
from taskloom.methods.routing.roma.claim import CLAIMS
from taskloom.methods.routing.roma.claim_model import Rows, SparseMLP

COUNT = 60
CONFIG = RoMAConfig(layers=-2)
SETTINGS = {**CLAIMS[0].config, "width": 12, "hidden": 6, "experts": 5}


def _model(seed: int = 0) -> SparseMLP:
    torch.manual_seed(seed)
    return SparseMLP(SETTINGS)


def _data() -> Rows:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, SETTINGS["seen"] + SETTINGS["features"], generator=generator)
    return Rows(x, torch.randint(4, (COUNT,), generator=generator), normalize(torch.randn(COUNT, 6, generator=generator), dim=1))


DATA = _data()


def _loader(size: int = 16) -> list[Tensor]:
    return list(DATA.x.split(size))


def _classes(batch: Tensor) -> Tensor:
    """Those of rows, which are found by their inputs."""
    return DATA.y[(DATA.x[:, None] == batch).all(2).int().argmax(0)]


def _correct(batch: Tensor, output: tuple[Tensor, Tensor]) -> Tensor:
    return output[0].argmax(1) == _classes(batch)


def _reference(model: nn.Module, config: RoMAConfig = CONFIG) -> ReferenceSet:
    return build_reference(model, _loader(), DATA.emb, _correct, config)


def _steps(count: int = 6, size: int = 20) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        rows = torch.randint(COUNT, (size,), generator=generator)
        yield rows, DATA.x[rows]


def _task_loss(batch: Tensor, output: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(output[0], _classes(batch))


def _tuned(config: RoMAConfig, **options: Any) -> tuple[nn.Module, list[float]]:
    model = _model()
    reference = _reference(model, config)
    neighbors = neighbor_weights(DATA.emb, reference, config, torch.arange(COUNT))
    optimizer = torch.optim.AdamW(train_only_routers(model, config.layers), lr=1e-2)
    given = {"reference": reference, "neighbors": neighbors, **options}
    return model, tune_routers(model, _steps(), _task_loss, optimizer, config, **given)


def _same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_reference_is_what_is_answered_correctly() -> None:
    model = _model()
    reference = _reference(model)
    with torch.no_grad(), RoutingRecorder(model, -2) as recorder:
        correct = (model(DATA.x)[0].argmax(1) == DATA.y).nonzero().squeeze(1)
        r = recorder.r
    assert 0 < len(correct) < COUNT
    assert torch.equal(reference.keys, correct)
    assert torch.equal(reference.emb, DATA.emb[correct])
    torch.testing.assert_close(reference.r, r[correct], rtol=1e-6, atol=1e-6)
    assert reference.experts == (5, 5)
    assert not reference.r.requires_grad
    moved = reference.to("cpu")
    assert torch.equal(moved.r, reference.r)


def test_the_batches_of_the_loader_do_not_matter() -> None:
    model = _model()
    whole = build_reference(model, [DATA.x], DATA.emb, _correct, CONFIG)
    parts = build_reference(model, [(one,) for one in _loader(7)], DATA.emb, lambda batch, out: _correct(batch[0], out), CONFIG)
    named = build_reference(model, [DATA.batch()], DATA.emb, lambda batch, out: _correct(batch["x"], out), CONFIG)
    for other in (parts, named):
        assert torch.equal(whole.keys, other.keys)
        torch.testing.assert_close(whole.r, other.r)


def test_modes_and_gradients_are_as_before() -> None:
    model = _model().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    _reference(model)
    assert [module.training for module in model.modules()] == modes
    assert all(one.grad is None for one in model.parameters())
    with pytest.raises(ZeroDivisionError):
        build_reference(model, [DATA.x], DATA.emb, lambda batch, output: 1 // 0, CONFIG)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not model._forward_pre_hooks


def test_only_the_chosen_gates_change() -> None:
    before = _model()
    model, losses = _tuned(CONFIG)
    changed = {name for name, one in model.state_dict().items() if not torch.equal(one, before.state_dict()[name])}
    assert changed == {"layers.1.gate.weight", "layers.2.gate.weight"}
    assert len(losses) == 6
    assert {name for name, one in model.named_parameters() if one.grad is not None} == changed


def test_lam_zero_is_router_tuning_step_for_step() -> None:
    ours, losses = _tuned(replace(CONFIG, lam=0.0))
    model = _model()
    optimizer = torch.optim.AdamW(train_only_routers(model, -2), lr=1e-2)
    expected = []
    for _, batch in _steps():
        loss = cross_entropy(model(batch)[0], _classes(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected
    assert _same(ours, model)
    without, _ = _tuned(replace(CONFIG, lam=0.0), reference=None, neighbors=None)
    assert _same(ours, without)


def test_the_loss_is_that_of_the_card() -> None:
    """The loop that a user writes gives the same, bit for bit."""
    ours, losses = _tuned(CONFIG)
    model = _model()
    reference = _reference(model)
    ids, weight = neighbor_weights(DATA.emb, reference, CONFIG, torch.arange(COUNT))
    optimizer = torch.optim.AdamW(train_only_routers(model, -2), lr=1e-2)
    expected = []
    with CONFIG.recorder(model) as recorder:
        for rows, batch in _steps():
            loss = _task_loss(batch, model(batch))
            loss = loss + CONFIG.lam * manifold_loss(recorder.r, reference.r, ids[rows], weight[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert losses == expected
    assert _same(ours, model)


def test_the_same_seed_gives_the_same_bits() -> None:
    (one, first), (other, second) = _tuned(CONFIG), _tuned(CONFIG)
    assert first == second
    assert _same(one, other)


def test_routing_comes_nearer_to_that_of_the_neighbours() -> None:
    model, _ = _tuned(replace(CONFIG, lam=50.0))
    reference = _reference(_model())
    near = neighbor_weights(DATA.emb, reference, CONFIG, torch.arange(COUNT))
    distances = []
    for one in (_model(), model):
        with torch.no_grad(), CONFIG.recorder(one) as recorder:
            one(DATA.x)
        distances.append(float(manifold_loss(recorder.r, reference.r, *near).mean()))
    assert distances[1] < 0.9 * distances[0]


def test_samples_without_neighbours_have_the_task_loss_alone() -> None:
    plain, losses = _tuned(replace(CONFIG, lam=0.0))
    none = Neighbors(torch.zeros(COUNT, 3, dtype=torch.int64), torch.zeros(COUNT, 3))
    model, ours = _tuned(CONFIG, neighbors=none)
    assert ours == losses
    assert _same(model, plain)
    empty, ours = _tuned(CONFIG, neighbors=Neighbors(torch.zeros(COUNT, 0, dtype=torch.int64), torch.zeros(COUNT, 0)))
    assert ours == losses
    assert _same(empty, plain)


def test_topk_weights() -> None:
    config = replace(CONFIG, weights="topk")
    reference = _reference(_model(), config)
    assert ((reference.r > 0).sum(1) == 4).all()
    torch.testing.assert_close(reference.r.sum(1), torch.full((len(reference.r),), 2.0))
    model, _ = _tuned(config)
    full, _ = _tuned(CONFIG)
    assert not torch.equal(model.layers[2].gate.weight, full.layers[2].gate.weight)


def test_the_reference_may_be_refreshed() -> None:
    model, _ = _tuned(CONFIG)
    stale = _reference(_model())
    fresh = refresh_reference(model, _loader(), stale, CONFIG)
    assert torch.equal(fresh.keys, stale.keys)
    assert torch.equal(fresh.emb, stale.emb)
    with torch.no_grad(), CONFIG.recorder(model) as recorder:
        model(DATA.x)
    torch.testing.assert_close(fresh.r, recorder.r[stale.keys], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(fresh.r, stale.r)


def test_refreshing_every_few_steps() -> None:
    config = replace(CONFIG, refresh_every=2)
    ours, losses = _tuned(config, refresh=_loader())
    model = _model()
    reference = _reference(model)
    ids, weight = neighbor_weights(DATA.emb, reference, config, torch.arange(COUNT))
    optimizer = torch.optim.AdamW(train_only_routers(model, -2), lr=1e-2)
    expected = []
    for step, (rows, batch) in enumerate(_steps()):
        if step in (2, 4):
            reference = refresh_reference(model, _loader(), reference, config)
        with config.recorder(model) as recorder:
            loss = _task_loss(batch, model(batch))
            loss = loss + config.lam * manifold_loss(recorder.r, reference.r, ids[rows], weight[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected
    assert _same(ours, model)
    never, _ = _tuned(CONFIG)
    assert not _same(ours, never)


def test_without_the_manifold_loss_nothing_is_refreshed() -> None:
    config = replace(CONFIG, refresh_every=2, lam=0.0)
    with pytest.raises(ZeroDivisionError):
        _tuned(replace(config, lam=1.0), refresh=(1 // 0 for _ in range(1)))
    ours, _ = _tuned(config, refresh=(1 // 0 for _ in range(1)))
    assert _same(ours, _tuned(replace(CONFIG, lam=0.0))[0])


def test_a_table_of_16_bits_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = _reference(_model())
    seen: list[torch.dtype] = []

    def loss(r: Tensor, table: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        seen.append(table.dtype)
        return manifold_loss(r, table, ids, weight)

    monkeypatch.setattr("taskloom.methods.routing.roma.tune.manifold_loss", loss)
    _, losses = _tuned(CONFIG, reference=replace(reference, r=reference.r.bfloat16()))
    assert seen == [torch.bfloat16] * len(losses)
    _, rounded = _tuned(CONFIG, reference=replace(reference, r=reference.r.bfloat16().float()))
    assert losses == pytest.approx(rounded, rel=1e-6)


def test_a_language_model() -> None:
    """The lines of the page, on a model of transformers with prompts, answers and padding."""
    model = tiny_model("olmoe")
    tokens = tiny_tokens(6, 8)
    mask = torch.ones_like(tokens)
    mask[2:4, :3] = 0
    labels = torch.where(torch.arange(8) >= 7, tokens, -100)
    batches = [{"input_ids": tokens[i : i + 3], "attention_mask": mask[i : i + 3], "labels": labels[i : i + 3]} for i in (0, 3)]
    config = RoMAConfig(layers=-1, k=2)
    ends = torch.full((3,), 6)

    def is_correct(batch: dict[str, Tensor], output: Any) -> Tensor:
        return output.logits[:, -2].argsort(1, descending=True)[:, :25].eq(batch["labels"][:, -1:]).any(1)

    emb = normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    reference = build_reference(model, batches, emb, is_correct, config, positions=lambda batch: ends)
    neighbors = neighbor_weights(emb, reference, config, torch.arange(6))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(train_only_routers(model, config.layers), lr=1e-2)
    steps = [(torch.arange(i, i + 3), batch) for i, batch in zip((0, 3), batches, strict=True)] * 4
    losses = tune_routers(
        model,
        steps,
        lambda batch, output: output.loss,
        optimizer,
        config,
        reference=reference,
        neighbors=neighbors,
        positions=lambda batch: ends,
    )
    assert losses[-1] + losses[-2] < losses[0] + losses[1]
    changed = [name for name, one in model.state_dict().items() if not torch.equal(one, before[name])]
    assert changed == ["model.layers.1.mlp.gate.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_correct": lambda batch, output: torch.zeros(len(batch), dtype=torch.bool)}, "answers none of 60 samples correctly"),
        (
            {"is_correct": lambda batch, output: output[0][:, 0]},
            r"is_correct: expected a bool tensor of shape \(16,\), got torch.float32",
        ),
        ({"is_correct": lambda batch, output: True}, r"is_correct: expected a bool tensor of shape \(16,\), got bool"),
        ({"embeddings": DATA.emb[:50]}, "embeddings: expected 60 rows, one for each sample of the loader, got 50"),
        ({"embeddings": DATA.emb[0]}, r"embeddings: expected floating numbers of shape \(N, F\)"),
        ({"config": RoMAConfig()}, "layers: expected at most 3 last routers"),
    ],
)
def test_bad_references(arguments: dict[str, Any], message: str) -> None:
    model = _model()
    given = {"embeddings": DATA.emb, "is_correct": _correct, "config": CONFIG, **arguments}
    with pytest.raises(ValueError, match=message):
        build_reference(model, _loader(), **given)


def test_a_model_without_routers_has_no_reference() -> None:
    with pytest.raises(ValueError, match="Linear has no router"):
        build_reference(nn.Linear(2, 2), [], DATA.emb, lambda batch, output: output, CONFIG)


def test_bad_refreshes() -> None:
    model = _model()
    reference = _reference(model)
    with pytest.raises(ValueError, match=r"config: expected routers of \(5, 5\) experts, got \(5,\)"):
        refresh_reference(model, _loader(), reference, replace(CONFIG, layers=-1))
    with pytest.raises(ValueError, match=r"loader: expected more than .* samples, got 16"):
        refresh_reference(model, _loader()[:1], reference, CONFIG)


def test_bad_tuning() -> None:
    model = _model()
    reference = _reference(model)
    neighbors = neighbor_weights(DATA.emb, reference, CONFIG, torch.arange(COUNT))
    optimizer = torch.optim.AdamW(model.parameters())

    def tune(config: RoMAConfig = CONFIG, steps: Any = None, **options: Any) -> None:
        given = {"reference": reference, "neighbors": neighbors, **options}
        tune_routers(model, list(_steps(1)) if steps is None else steps, _task_loss, optimizer, config, **given)

    with pytest.raises(ValueError, match=r"expected that only chosen routers require grad, also does first\.weight"):
        tune()
    train_only_routers(model, -2)
    with pytest.raises(ValueError, match="reference, neighbors: expected both, since lam is above 0"):
        tune(neighbors=None)
    with pytest.raises(ValueError, match="refresh: expected the reference's loader, since refresh_every is set"):
        tune(replace(CONFIG, refresh_every=3))
    with pytest.raises(ValueError, match=r"reference: expected routers of \(5, 5, 5\) experts, got \(5, 5\)"):
        tune(replace(CONFIG, layers="all"))
    with pytest.raises(ValueError, match="neighbors: expected rows of a reference of"):
        tune(neighbors=Neighbors(torch.full((COUNT, 3), 99), neighbors.weight))
    for samples, message in (
        (torch.arange(3), r"the numbers of 20 samples, int64, got shape \(3,\) and torch.int64"),
        (torch.arange(20).int(), r"the numbers of 20 samples, int64, got shape \(20,\) and torch.int32"),
        (torch.arange(20) - 1, f"numbers of samples from 0 to {COUNT - 1}, got -1"),
        (torch.arange(20) + COUNT - 19, f"numbers of samples from 0 to {COUNT - 1}, got {COUNT}"),
    ):
        with pytest.raises(ValueError, match=f"steps: expected {message}"):
            tune(steps=[(samples, DATA.x[:20])])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires grad; call train_only_routers first"):
        tune()
