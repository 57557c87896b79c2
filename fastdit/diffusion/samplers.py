"""Samplers: from x at ts[0] to x at ts[-1], through `denoise(x_t, t) -> Prediction`; t = 1 is noise, t = 0 is data.

Each is one function `sampler(denoise, x_1, ts, path, *, noise, ...)`: x_1 (N, C, h, w); ts descending times, float64,
as an objective's `timesteps` makes them; `noise(x)` standard normal numbers like x. It knows no network, no label and
no guidance. Coefficients are float64 scalars and meet x in its own dtype. `ddim`, `euler` and `heun` also run on
ascending times, from data to noise. Every step of every sampler can be seen through `guidance.watched`.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from fastdit.diffusion.guidance import Denoiser
from fastdit.diffusion.paths import Path
from fastdit.diffusion.prediction import Prediction, reverse_moments

Noise = Callable[[Tensor], Tensor]


@torch.no_grad()
def ddpm(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) on any path and subset of its times; the variance is the prediction's own."""
    x = x_1
    for t, s in pairwise(ts):
        mean, log_variance = reverse_moments(denoise(x, t), x, t, s, path)
        x = mean + torch.exp(0.5 * log_variance) * noise(x) if s > 0 else mean
    return x


@torch.no_grad()
def ddim(
    denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like, eta: float = 0.0
) -> Tensor:
    """Song et al. 2021: eta = 0 draws nothing and is invertible, eta = 1 draws with the posterior's variance."""
    x = x_1
    for t, s in pairwise(ts):
        prediction = denoise(x, t)
        if not eta:
            x = redrawn(prediction, s, path)
            continue
        variance = eta**2 * path.posterior(t, s)[2]
        x = path.alpha(s) * prediction.x_0 + (path.sigma(s) ** 2 - variance).sqrt() * prediction.eps
        x = x + variance.sqrt() * noise(x) if variance > 0 else x
    return x


def redrawn(prediction: Prediction, s: Tensor, path: Path) -> Tensor:
    """x_s of the same x_0 and eps: also the step from or to t = 0, where velocities may be infinite."""
    return path.alpha(s) * prediction.x_0 + path.sigma(s) * prediction.eps


def singular(path: Path, t: Tensor) -> bool:
    """Whether dx/dt is infinite at t: sigma grows like sqrt(t) at t = 0 of VP and of every DDPM schedule."""
    return not torch.isfinite(path.d_sigma(t))


@torch.no_grad()
def euler(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """The probability-flow ODE dx/dt = velocity by Euler's method, one evaluation a step; draws nothing."""
    x = x_1
    for t, s in pairwise(ts):
        prediction = denoise(x, t)
        if singular(path, t) or singular(path, s):
            x = redrawn(prediction, s, path)
        else:
            x = x + (s - t) * prediction.velocity
    return x


@torch.no_grad()
def heun(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """The same ODE by the trapezoidal rule, second order, two evaluations a step."""
    x = x_1
    for t, s in pairwise(ts):
        prediction = denoise(x, t)
        if singular(path, t) or singular(path, s):
            x = redrawn(prediction, s, path)
        else:
            ahead = denoise(x + (s - t) * prediction.velocity, s)
            x = x + (s - t) / 2 * (prediction.velocity + ahead.velocity)
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun}
