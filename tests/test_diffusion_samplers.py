"""Samplers against distributions whose denoiser is known in closed form, on every path there is."""

import inspect

import pytest
import torch

from fastdit.diffusion.objectives import DDPM, FlowMatching
from fastdit.diffusion.paths import PATHS, SCHEDULES, broadcast
from fastdit.diffusion.prediction import Prediction
from fastdit.diffusion.samplers import SAMPLERS

MEAN, STD = 1.5, 0.4


def gaussian(path, mean=MEAN, std=STD):
    """The exact denoiser of data N(mean, std^2)."""

    def denoise(x_t, t):
        alpha, sigma, d_alpha, d_sigma = (broadcast(c, x_t) for c in path(torch.as_tensor(t, dtype=torch.float64)))
        excess = (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x_0, eps = mean + alpha * std**2 * excess, sigma * excess
        return Prediction(x_0, eps, d_alpha * x_0 + d_sigma * eps)

    return denoise


def seeded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def times(name, steps):
    """The times at which an objective would sample this path."""
    if name.startswith("ddpm_"):
        return DDPM(name.removeprefix("ddpm_"), "v").timesteps(steps)
    return FlowMatching(name).timesteps(steps)


def fine(sampler):
    """Options for a small error: a noiseless last step from t = 0.04 would blur what a tenth of noise hides."""
    return {"last_step_size": 0.01} if "last_step_size" in inspect.signature(SAMPLERS[sampler]).parameters else {}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
def test_a_gaussian_is_recovered(path, sampler):
    ts = times(path, 500)
    noise = seeded()
    # from the true marginal: pure noise is not it where a schedule keeps signal at t = 1 (Lin et al. 2023)
    alpha, sigma, _, _ = PATHS[path](ts[0])
    z = noise(torch.empty(10_000, 1, 1, 1, dtype=torch.float64))
    x_1 = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z
    x_0 = SAMPLERS[sampler](gaussian(PATHS[path]), x_1, ts, PATHS[path], noise=noise, **fine(sampler))
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x_0.std().item() == pytest.approx(STD, rel=0.03)


def test_every_schedule_is_a_path():
    assert {f"ddpm_{name}" for name in SCHEDULES} < PATHS.keys()
