"""DTR: which channels a timestep sees, the weights of the loss, and the diffusion around them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from taskloom.methods.channels.dtr import (
    Diffusion,
    Ema,
    RandomRouting,
    UncertaintyWeighting,
    betas,
    cluster_timesteps,
    dtr_starts,
    frechet_distance,
    min_snr_weight,
    p2_weight,
    random_routing_mask,
    respaced_timesteps,
)
from taskloom.methods.channels.dtr.routing import FORMULAS
from taskloom.methods.threads import one_thread


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Threads only cost time at these sizes."""
    with one_thread():
        yield


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_window_of_the_card() -> None:
    start, width = dtr_starts(10, 10, 0.6, 4.0)
    assert start.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 2, 4]
    assert width.tolist() == [6] * 10
    assert (start.dtype, width.dtype) == (torch.int32, torch.int32)


def _official(tasks: int, channels: int, beta: float, alpha: float) -> np.ndarray[Any, Any]:
    """Masks as the official code fills them, row by row."""
    width = int(channels * beta)
    masks = np.zeros((tasks, channels), bool)
    for task, place in enumerate(((np.linspace(0, 1, tasks) ** alpha) * (channels - width)).round().astype(np.int64)):
        masks[task, place : place + width] = True
    return masks


def _masks(start: Tensor, width: Tensor, channels: int) -> np.ndarray[Any, Any]:
    place = np.arange(channels)
    return (place >= start.numpy()[:, None]) & (place < (start + width).numpy()[:, None])


@given(
    tasks=st.integers(1, 60),
    channels=st.integers(1, 90),
    beta=st.floats(0.02, 1.0),
    alpha=st.floats(0.25, 8.0),
)
def test_windows_slide_from_the_first_channels_to_the_last(tasks: int, channels: int, beta: float, alpha: float) -> None:
    if int(channels * beta) == 0:
        with pytest.raises(ValueError, match="beta: expected at least one channel"):
            dtr_starts(tasks, channels, beta, alpha)
        return
    start, width = dtr_starts(tasks, channels, beta, alpha)
    masks = _masks(start, width, channels)
    np.testing.assert_array_equal(masks, _official(tasks, channels, beta, alpha))
    assert start[0] == 0
    assert (start[1:] >= start[:-1]).all()
    assert start[-1] + width[-1] == channels or tasks == 1
    shared = masks.astype(int) @ masks.T.astype(int)
    apart = (start[:, None] - start[None]).abs().numpy()
    for row, distance in zip(shared, apart, strict=True):
        order = np.argsort(distance, kind="stable")
        assert (np.diff(row[order]) <= 0).all()


@given(tasks=st.integers(1, 40), channels=st.integers(2, 60), beta=st.floats(0.5, 1.0), alpha=st.floats(0.5, 6.0))
def test_the_papers_formula_channel_by_channel(tasks: int, channels: int, beta: float, alpha: float) -> None:
    start, width = dtr_starts(tasks, channels, beta, alpha, "paper")
    least = int(channels * beta)
    room = channels - least
    masks = _masks(start, width, channels)
    for t in range(1, tasks + 1):
        low = round(room * np.float64((t - 1) / tasks) ** alpha)
        high = round(room * np.float64(t / tasks) ** alpha) + least
        assert masks[t - 1].tolist() == [low < c <= high for c in range(1, channels + 1)]
    assert (width >= least).all()
    assert start[-1] + width[-1] == channels


def test_widths_of_the_papers_formula() -> None:
    assert set(dtr_starts(1000, 1024, 0.8, 4.0, "paper")[1].tolist()) == {819, 820}
    assert int(dtr_starts(8, 1024, 0.8, 4.0, "paper")[1].max()) > 900


@pytest.mark.parametrize("size", [384, 768, 1024, 1152])
def test_no_routing_at_beta_one(size: int) -> None:
    for formula in FORMULAS:
        start, width = dtr_starts(1000, size, 1.0, formula=formula)
        assert not start.any()
        assert (width == size).all()


@pytest.mark.parametrize(("size", "width", "room"), [(384, 307, 77), (768, 614, 154), (1024, 819, 205), (1152, 921, 231)])
def test_windows_of_dit(size: int, width: int, room: int) -> None:
    start, widths = dtr_starts(1000, size)
    assert widths.unique().tolist() == [width]
    assert int(start[-1]) == room
    assert len(start.unique()) == room + 1


def test_random_masks_have_as_many_channels_and_repeat() -> None:
    masks = random_routing_mask(50, 23, 0.6, _generator(3))
    assert masks.dtype == torch.bool
    assert (masks.sum(1) == 13).all()
    assert torch.equal(masks, random_routing_mask(50, 23, 0.6, _generator(3)))
    assert len(masks.unique(dim=0)) > 40
    # Every channel is as likely as any other: 30 of 50 tasks on average, and 3.5 is the deviation.
    assert (masks.sum(0) - 50 * 13 / 23).abs().max() < 18


def test_random_masks_are_saved_with_the_model() -> None:
    first, second = (RandomRouting(9, 7, 0.5, _generator(seed)) for seed in (0, 1))
    t = torch.tensor([8, 0, 3])
    assert not torch.equal(first(t), second(t))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(t), second(t))
    assert torch.equal(first(t), first.state_dict()["mask"][[8, 0, 3]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta: expected a share above 0 and at most 1, got 0.0"),
        ({"beta": 1.01}, ValueError, "beta: expected a share above 0 and at most 1, got 1.01"),
        ({"beta": math.nan}, ValueError, "beta: expected a share above 0"),
        ({"beta": 0.09}, ValueError, "beta: expected at least one channel of 10 to stay active, got 0.09"),
        ({"num_tasks": 0}, ValueError, "num_tasks: expected at least 1, got 0"),
        ({"num_tasks": 10.0}, TypeError, "num_tasks: expected an integer, got float"),
        ({"channels": 0}, ValueError, "channels: expected at least 1, got 0"),
        ({"channels": True}, TypeError, "channels: expected an integer, got bool"),
    ],
)
def test_bad_tables(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given_arguments: dict[str, Any] = {"num_tasks": 10, "channels": 10, "beta": 0.6, **arguments}
    for make in (dtr_starts, random_routing_mask, RandomRouting):
        with pytest.raises(error, match=message):
            make(**given_arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha: expected a finite power above 0, got 0.0"),
        ({"alpha": -1.0}, "alpha: expected a finite power above 0, got -1.0"),
        ({"alpha": math.inf}, "alpha: expected a finite power above 0, got inf"),
        ({"alpha": math.nan}, "alpha: expected a finite power above 0, got nan"),
        ({"formula": "page"}, "formula: expected one of 'code', 'paper', got 'page'"),
    ],
)
def test_bad_windows(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dtr_starts(10, 10, 0.6, **arguments)


def test_bad_timesteps() -> None:
    routing = RandomRouting(9, 7)
    for t in (torch.tensor([0, 9]), torch.tensor([-1, 3])):
        with pytest.raises(IndexError, match=r"t: expected timesteps from 0 to 8, got (9|-1)"):
            routing(t)
    with pytest.raises(TypeError, match=r"t: expected a tensor of integers, got a tensor of torch.float32"):
        routing(torch.tensor([0.0]))
    with pytest.raises(TypeError, match="t: expected a tensor of integers, got int"):
        routing(3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_timesteps_of_any_integers(dtype: torch.dtype) -> None:
    """Torch itself takes unsigned bytes for a mask."""
    routing, diffusion = RandomRouting(9, 7), Diffusion("linear", 50)
    t = torch.tensor([0, 8, 3, 1, 1, 0, 5, 2, 1])
    assert torch.equal(routing(t.to(dtype)), routing(t))
    assert torch.equal(diffusion.snr(t.to(dtype)), diffusion.snr(t))


def test_weights_of_the_loss() -> None:
    snr = torch.tensor([1e-9, 0.5, 5.0, 20.0])
    torch.testing.assert_close(min_snr_weight(snr), torch.tensor([1.0, 1.0, 1.0, 0.25]))
    assert min_snr_weight(torch.zeros(1)).item() == 1
    torch.testing.assert_close(p2_weight(snr, gamma=0.5, k=2.0), (2.0 + snr) ** -0.5)
    with pytest.raises(ValueError, match="gamma: expected a number above 0, got 0"):
        min_snr_weight(snr, 0)
    with pytest.raises(ValueError, match="k: expected a number above 0, got -1"):
        p2_weight(snr, k=-1)


def test_uncertainty_weighting_is_the_papers_sum() -> None:
    weighting = UncertaintyWeighting()
    losses = torch.rand(24, generator=_generator(), dtype=torch.float64)
    with torch.no_grad():
        weighting.double().log_variance.copy_(torch.linspace(-1, 1, 8))
    expected = sum(
        0.5 * (math.exp(-s) * losses[3 * i : 3 * i + 3].mean() / 8 + s) for i, s in enumerate(torch.linspace(-1, 1, 8).double().tolist())
    )
    torch.testing.assert_close(weighting(losses), torch.as_tensor(expected))
    assert not UncertaintyWeighting().log_variance.any()


def test_uncertainty_weighting_learns_the_level_of_each_cluster() -> None:
    weighting = UncertaintyWeighting(4)
    losses = torch.tensor([4.0, 8.0, 16.0, 32.0])
    optimizer = torch.optim.AdamW(weighting.parameters(), lr=0.025, weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variance.detach(), (losses / 4).log(), atol=0.02, rtol=0)


def test_timesteps_of_clusters() -> None:
    t = cluster_timesteps(80, 1003, generator=_generator())
    edges = [int(1003 / 8 * place) for place in range(9)]
    for place, drawn in enumerate(t.view(8, 10)):
        assert edges[place] <= drawn.min()
        assert drawn.max() < edges[place + 1]
    assert torch.equal(t, cluster_timesteps(80, 1003, generator=_generator()))


def test_bad_clusters() -> None:
    with pytest.raises(ValueError, match="batch: expected a multiple of the 8 clusters of timesteps, got 12"):
        cluster_timesteps(12, 1000)
    with pytest.raises(ValueError, match="num_timesteps: expected at least the 8 clusters, got 7"):
        cluster_timesteps(16, 7)
    with pytest.raises(ValueError, match="clusters: expected at least 1, got 0"):
        UncertaintyWeighting(0)
    with pytest.raises(ValueError, match=r"losses: expected one per sample, \[N\], got shape \(8, 1\)"):
        UncertaintyWeighting()(torch.ones(8, 1))
    with pytest.raises(ValueError, match="batch: expected a multiple of the 8 clusters"):
        UncertaintyWeighting()(torch.ones(9))


def test_schedules() -> None:
    linear, cosine = betas("linear"), betas("cosine")
    np.testing.assert_allclose(linear.numpy(), np.linspace(1e-4, 0.02, 1000), rtol=1e-12)
    level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.numpy(), np.minimum(1 - level[1:] / level[:-1], 0.999), rtol=1e-9)
    np.testing.assert_allclose(betas("linear", 250).numpy(), np.linspace(4e-4, 0.08, 250), rtol=1e-12)
    for bad, message in [
        (("quad",), "schedule: expected 'cosine' or 'linear', got 'quad'"),
        (("cosine", 0), "num_timesteps: expected"),
        (("linear", 20), "num_timesteps: expected more than 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            betas(*bad)


def test_respaced_timesteps_reach_both_ends() -> None:
    assert respaced_timesteps(1000, 1000) == list(range(1000))
    for steps in (2, 50, 250, 999):
        used = respaced_timesteps(1000, steps)
        assert (len(set(used)), used[0], used[-1]) == (steps, 0, 999)
        assert used == sorted(used)
    assert respaced_timesteps(1000, 1) == [999]
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps: expected from 1 to 1000, got {steps}"):
            respaced_timesteps(1000, steps)


def test_loss_of_each_sample() -> None:
    diffusion = Diffusion("linear", 100)
    generator = _generator()
    x0, noise = (torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 50, 99])
    kept = np.cumprod(1 - np.linspace(1e-3, 0.2, 100))[t.numpy()]
    noisy = np.sqrt(kept)[:, None, None, None] * x0.numpy() + np.sqrt(1 - kept)[:, None, None, None] * noise.numpy()
    np.testing.assert_allclose(diffusion.noised(x0, t, noise).numpy(), noisy, rtol=1e-12)
    losses = diffusion.losses(lambda x, at: x * at.view(-1, 1, 1, 1), x0, t, noise)
    np.testing.assert_allclose(losses.numpy(), ((noisy * t.numpy()[:, None, None, None] - noise.numpy()) ** 2).mean((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(diffusion.snr(t).numpy(), kept / (1 - kept), rtol=1e-6)


def test_predictions_and_timesteps_of_other_shapes_are_refused() -> None:
    """Torch would stretch most of them."""
    diffusion = Diffusion("linear", 100)
    x0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 50, 99])
    with_variance = r"predict: expected the images' shape \(3, 1, 4, 4\), got \(3, 2, 4, 4\)"
    with pytest.raises(ValueError, match=with_variance):
        diffusion.losses(lambda x, t: torch.cat([x, x], 1), x0, t, noise)
    with pytest.raises(ValueError, match=with_variance):
        diffusion.sample(lambda x, t: torch.cat([x, x], 1), noise, 2)
    with pytest.raises(ValueError, match=r"noise: expected the images' shape \(3, 1, 4, 4\), got \(1, 4, 4\)"):
        diffusion.losses(lambda x, t: x, x0, t, noise[0])
    with pytest.raises(ValueError, match=r"t: expected shape \(3,\), one for each sample, got \(1,\)"):
        diffusion.losses(lambda x, t: x, x0, t[:1], noise)
    for wrong in (t - 1, t + 1):
        with pytest.raises(IndexError, match=r"t: expected timesteps from 0 to 99, got (-1|100)"):
            diffusion.losses(lambda x, t: x, x0, wrong, noise)
    with pytest.raises(TypeError, match=r"t: expected a tensor of integers, got a tensor of torch.float32"):
        diffusion.snr(t.float())


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_sampling_with_the_true_noise_gives_the_image(steps: int) -> None:
    diffusion = Diffusion("linear", 1000)
    image = torch.rand(2, 1, 3, 3, generator=_generator(), dtype=torch.float64) * 2 - 1

    def predict(x: Tensor, t: Tensor) -> Tensor:
        kept = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - kept.sqrt() * image) / (1 - kept).sqrt()

    noise = torch.randn(2, 1, 3, 3, generator=_generator(1), dtype=torch.float64)
    for eta in (0.0, 1.0):
        sampled = diffusion.sample(predict, noise, steps, eta=eta, generator=_generator(2))
        torch.testing.assert_close(sampled, image, atol=1e-9, rtol=0)


def test_sampled_data_have_the_spread_of_the_data() -> None:
    """For normal data of deviation s the best prediction of the noise is known, and DDIM with many steps turns noise into such data."""
    diffusion, spread = Diffusion("cosine", 1000), 0.3

    def predict(x: Tensor, t: Tensor) -> Tensor:
        kept = diffusion.alphas_cumprod[t].view(-1, 1)
        return x * (1 - kept).sqrt() / (kept * spread**2 + 1 - kept)

    noise = torch.randn(2000, 1, generator=_generator(), dtype=torch.float64)
    for eta in (0.0, 1.0):
        sampled = diffusion.sample(predict, noise, 100, eta=eta, clip=None, generator=_generator(1))
        assert sampled.std().item() == pytest.approx(spread, rel=0.08)


def test_samplers_ask_for_original_timesteps() -> None:
    diffusion, seen = Diffusion("cosine", 1000), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.tolist())
        return torch.zeros_like(x)

    noise = torch.randn(2, 3, generator=_generator())
    before = noise.clone()
    diffusion.sample(predict, noise, 5)
    assert seen == [[t, t] for t in (999, 749, 500, 250, 0)]
    assert torch.equal(noise, before)
    with pytest.raises(ValueError, match=r"eta: expected from 0 to 1, got 1.5"):
        diffusion.sample(predict, noise, 5, eta=1.5)


def test_running_mean_of_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2), RandomRouting(3, 4))
    ema = Ema(model, 0.75)
    first = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    model[1].mask.fill_(False)
    ema.update(model)
    torch.testing.assert_close(ema.model[0].weight, 0.75 * first + 0.5)
    assert not ema.model[1].mask.any()
    assert not ema.model.training
    assert not any(one.requires_grad for one in ema.model.parameters())
    with pytest.raises(ValueError, match=r"decay: expected from 0 to below 1, got 1"):
        Ema(model, 1)


def test_frechet_distance_is_that_of_the_moments() -> None:
    generator = _generator()
    one = torch.randn(500, 2, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + 0.5) == pytest.approx(6 * 0.25)
    # For covariances that commute: the sum of the squared differences of the deviations.
    deviations = torch.linalg.eigvalsh(one.flatten(1).mT.cov()).sqrt()
    mean = one.mean(0)
    assert frechet_distance(one, mean + 3 * (one - mean)) == pytest.approx(float((2 * deviations).square().sum()))
    other = one @ torch.randn(3, 3, generator=generator, dtype=torch.float64)
    covs = [x.flatten(1).numpy().T for x in (one, other)]
    covs = [np.cov(x) for x in covs]
    roots = np.sqrt(np.linalg.eigvals(covs[0] @ covs[1]).astype(complex)).real.sum()
    shift = (one.mean(0) - other.mean(0)).square().sum().item()
    assert frechet_distance(one, other) == pytest.approx(shift + np.trace(covs[0] + covs[1]) - 2 * roots)
    with pytest.raises(ValueError, match="other: expected at least two samples of 6 features"):
        frechet_distance(one, one[:, :1])
