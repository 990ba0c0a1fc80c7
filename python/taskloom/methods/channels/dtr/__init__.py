"""Denoising task routing: each timestep of a diffusion model sees a window of the channels, which slides as the noise grows.

Source: "Denoising Task Routing for Diffusion Models", ICLR 2024, arXiv 2310.07138.
"""

from __future__ import annotations

from taskloom.methods.channels.dtr.convert import convert_adm, convert_dit
from taskloom.methods.channels.dtr.diffusion import Diffusion, betas, respaced_timesteps
from taskloom.methods.channels.dtr.dit import RoutedDiT, RoutedDiTBlock
from taskloom.methods.channels.dtr.ema import Ema
from taskloom.methods.channels.dtr.frechet import frechet_distance
from taskloom.methods.channels.dtr.losses import UncertaintyWeighting, cluster_timesteps, min_snr_weight, p2_weight
from taskloom.methods.channels.dtr.routing import RandomRouting, dtr_starts, dtr_window, random_routing_mask
from taskloom.methods.channels.dtr.unet import RoutedResBlock

__all__ = [
    "Diffusion",
    "Ema",
    "RandomRouting",
    "RoutedDiT",
    "RoutedDiTBlock",
    "RoutedResBlock",
    "UncertaintyWeighting",
    "betas",
    "cluster_timesteps",
    "convert_adm",
    "convert_dit",
    "dtr_starts",
    "dtr_window",
    "frechet_distance",
    "min_snr_weight",
    "p2_weight",
    "random_routing_mask",
    "respaced_timesteps",
]
