"""Gaussian diffusion with a model that predicts the noise: schedules, the loss, and DDIM sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from taskloom.methods.channels.dtr.routing import check_timesteps

Schedule = Literal["cosine", "linear"]
# Noise of noisy images [N, ...] at timesteps [N].
PredictNoise = Callable[[Tensor, Tensor], Tensor]

_MAX_BETA = 0.999
_COSINE_OFFSET = 0.008


def betas(schedule: Schedule, num_timesteps: int = 1000) -> Tensor:
    """Variances of the noise that each timestep adds, float64 [T].

    Parameters
    ----------
    schedule
        ``"cosine"``: improved DDPM (arXiv 2102.09672), offset 0.008, at most 0.999. ``"linear"``: DDPM (arXiv 2006.11239), 1e-4 to 0.02 for
        1000 timesteps, scaled for another number.
    num_timesteps
        T. Default 1000.

    Raises
    ------
    ValueError
        If the schedule is unknown, T is below 1, or so small that a scaled variance reaches 1.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps: expected at least 1, got {num_timesteps}")
    if schedule == "cosine":
        share = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        kept = torch.cos((share + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2
        return (1 - kept[1:] / kept[:-1]).clamp(max=_MAX_BETA)
    if schedule == "linear":
        scale = 1000 / num_timesteps
        if scale * 0.02 >= 1:
            raise ValueError(f"num_timesteps: expected more than 20 for the linear schedule, got {num_timesteps}")
        return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    raise ValueError(f"schedule: expected 'cosine' or 'linear', got {schedule!r}")


def respaced_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Timesteps of a sampler with fewer steps, evenly spread from 0 to T - 1, rising.

    Raises
    ------
    ValueError
        If ``steps`` is not from 1 to T.

    Notes
    -----
    A single step is T - 1: a sampler begins at pure noise.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps: expected from 1 to {num_timesteps}, got {steps}")
    if steps == 1:
        return [num_timesteps - 1]
    return [round(place * (num_timesteps - 1) / (steps - 1)) for place in range(steps)]


def _check_shape(what: str, found: Tensor, images: Tensor) -> None:
    """Raise ValueError where two shapes differ; without this, torch might stretch the one to the other."""
    if found.shape != images.shape:
        raise ValueError(f"{what}: expected the images' shape {tuple(images.shape)}, got {tuple(found.shape)}")


class Diffusion:
    """Images become noise over T timesteps: ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``.

    Parameters
    ----------
    schedule, num_timesteps
        As in :func:`betas`. Default cosine and 1000.
    device
        Where the images are. Default the CPU.

    Attributes
    ----------
    alphas_cumprod
        a_t, float64 [T].
    """

    def __init__(self, schedule: Schedule = "cosine", num_timesteps: int = 1000, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = num_timesteps
        self.alphas_cumprod = torch.cumprod(1 - betas(schedule, num_timesteps), 0).to(device)

    def _kept(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), in the dtype of ``like`` and to be multiplied with it."""
        kept = self.alphas_cumprod[t.long()].view(-1, *[1] * (like.ndim - 1))
        return kept.sqrt().to(like.dtype), (1 - kept).sqrt().to(like.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratios ``a_t / (1 - a_t)``, float32 [N], of timesteps [N]; errors as of :meth:`noised`."""
        check_timesteps(t, self.num_timesteps)
        kept = self.alphas_cumprod[t.long()]
        return (kept / (1 - kept)).float()

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Images [N, ...] with the noise of their timesteps, integers [N].

        Raises
        ------
        TypeError
            If ``t`` holds no integers.
        IndexError
            If a timestep is not from 0 to T - 1 (looked at on a CPU).
        ValueError
            If noise or timesteps are not as many as the images.
        """
        check_timesteps(t, self.num_timesteps)
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t: expected shape ({len(x0)},), one for each sample, got {tuple(t.shape)}")
        _check_shape("noise", noise, x0)
        signal, deviation = self._kept(t, x0)
        return signal * x0 + deviation * noise

    def losses(self, predict: PredictNoise, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted noise, one per sample, [N].

        Errors are those of :meth:`noised`, and a ValueError where the prediction is not of the images' shape: with a learned variance,
        give ``lambda x, t: model(x, t, y)[:, :channels]``.
        """
        predicted = predict(self.noised(x0, t, noise), t)
        _check_shape("predict", predicted, x0)
        error = predicted - noise
        return error.square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(
        self,
        predict: PredictNoise,
        noise: Tensor,
        steps: int = 50,
        *,
        eta: float = 0.0,
        clip: float | None = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """DDIM: images [N, ...] from noise of that shape.

        Parameters
        ----------
        predict
            Called with images and their timesteps, int64 [N], of the original T, also where there are fewer steps: it is these that DTR's
            windows and the timestep's embedding belong to.
        noise
            [N, ...], where sampling begins.
        steps
            Default 50; see :func:`respaced_timesteps`.
        eta
            0, the default, draws nothing; 1 is as noisy as DDPM.
        clip
            Predicted images are kept within plus and minus this; None, for latents, leaves them. Default 1.
        generator
            For ``eta`` above 0, on the CPU. Default: torch's own.

        Raises
        ------
        ValueError
            If ``steps`` is not from 1 to T, ``eta`` is not from 0 to 1, or a prediction is not of the images' shape.

        Notes
        -----
        Source: Denoising Diffusion Implicit Models, arXiv 2010.02502, equation 12.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected from 0 to 1, got {eta}")
        x = noise
        used = respaced_timesteps(self.num_timesteps, steps)
        table = self.alphas_cumprod.tolist()
        for place in reversed(range(steps)):
            t = torch.full((len(x),), used[place], dtype=torch.int64, device=x.device)
            kept = table[used[place]]
            before = table[used[place - 1]] if place else 1.0
            predicted = predict(x, t)
            _check_shape("predict", predicted, x)
            x0 = (x - math.sqrt(1 - kept) * predicted) / math.sqrt(kept)
            if clip is not None:
                x0 = x0.clamp(-clip, clip)
            deviation = eta * math.sqrt((1 - before) / (1 - kept) * (1 - kept / before))
            # The noise that the predicted image leaves, which is the predicted noise where nothing was clipped.
            left = (x - math.sqrt(kept) * x0) / math.sqrt(1 - kept)
            x = math.sqrt(before) * x0 + math.sqrt(max(1 - before - deviation**2, 0.0)) * left
            if deviation:
                x = x + deviation * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return x
