"""Samplers: from x at ts[0] to x at ts[-1] with `denoise(x_t, t) -> Prediction`; t = 1 is noise, t = 0 is data.

Each sampler is a function `sampler(denoise, x_1, ts, path, *, noise, ...)`. x_1 has shape (N, C, h, w). ts are
descending float64 timesteps from an objective's `timesteps`. `noise(x)` returns standard normal noise in the shape,
dtype and device of x. Coefficients are computed as float64 scalars; x keeps its dtype. `ddim`, `euler`, `heun` and
`dopri5` also accept ascending timesteps, from data to noise. To observe every step, use `guidance.watched`.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from fastdit.diffusion.guidance import Denoiser
from fastdit.diffusion.paths import Path, half_diffusion
from fastdit.diffusion.prediction import Prediction, reverse_step
from fastdit.registry import check

Noise = Callable[[Tensor], Tensor]


@torch.no_grad()
def ddpm(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """Ancestral sampling (Ho et al. 2020) on any path and timesteps; the variance comes from the prediction."""
    x = x_1
    for t, s in pairwise(ts):
        mean, log_variance = reverse_step(denoise(x, t), x, t, s, path)
        x = mean + torch.exp(0.5 * log_variance) * noise(x) if s > 0 else mean
    return x


@torch.no_grad()
def ddim(
    denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021). eta = 0: deterministic and invertible. eta = 1: the variance of q(x_s | x_t, x_0)."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is out of range; use a value in [0, 1]")
    x = x_1
    for t, s in pairwise(ts):
        prediction = denoise(x, t)
        if not eta:
            x = ddim_step(prediction, s, path)
            continue
        variance = eta**2 * path.posterior(t, s)[2]
        x = path.alpha(s) * prediction.x_0 + (path.sigma(s) ** 2 - variance).clamp(min=0).sqrt() * prediction.eps
        x = x + variance.sqrt() * noise(x) if variance > 0 else x
    return x


def ddim_step(prediction: Prediction, s: Tensor, path: Path) -> Tensor:
    """x_s (N, C, h, w) from the predicted x_0 and eps. ODE samplers use it where the velocity is infinite, at t = 0."""
    return path.alpha(s) * prediction.x_0 + path.sigma(s) * prediction.eps


@torch.no_grad()
def euler(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """Euler's method for the probability-flow ODE dx/dt = velocity. Deterministic, one evaluation per step."""
    x = x_1
    for t, s in pairwise(ts):
        prediction = denoise(x, t)
        if path.singular(t) or path.singular(s):
            x = ddim_step(prediction, s, path)
        else:
            x = x + (s - t) * prediction.velocity
    return x


@torch.no_grad()
def heun(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """Heun's second-order method for the same ODE. Deterministic, two evaluations per step."""
    x = x_1
    for t, s in pairwise(ts):
        prediction = denoise(x, t)
        if path.singular(t) or path.singular(s):
            x = ddim_step(prediction, s, path)
        else:
            ahead = denoise(x + (s - t) * prediction.velocity, s)
            x = x + (s - t) / 2 * (prediction.velocity + ahead.velocity)
    return x


@torch.no_grad()
def dopri5(
    denoise: Denoiser,
    x_1: Tensor,
    ts: Tensor,
    path: Path,
    *,
    noise: Noise = torch.randn_like,
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> Tensor:
    """Dormand & Prince's adaptive method for the same ODE. Uses only the ends of ts, and the neighbor if singular.

    Step sizes depend on the error of the whole batch, so a sample depends on the others, within the tolerance.
    """
    from torchdiffeq import odeint

    x = x_1
    if path.singular(ts[0]):
        x, ts = ddim_step(denoise(x, ts[0]), ts[1], path), ts[1:]
    end = ts[-2:] if path.singular(ts[-1]) else ts[-1:]
    if ts[0] != end[0]:
        # integrate over 1 - t: torchdiffeq rounds times to the dtype of x, which near t = 1 would spoil 1 / alpha
        ends = 1 - torch.stack([ts[0], end[0]]).to(x.device)
        # torchdiffeq may step past the end and interpolate, which fails if the path is undefined for t < 0
        options = {"step_t": ends[1:]} if path.singular(torch.zeros_like(ts[0])) else {}
        solver = {"method": "dopri5", "atol": atol, "rtol": rtol, "options": options}
        state = x.to(torch.promote_types(x.dtype, torch.float32))  # error estimates need fp32
        slope = lambda u, state: -denoise(state.to(x.dtype), 1 - u.double()).velocity.to(state)  # noqa: E731
        x = odeint(slope, state, ends, **solver)[-1].to(x.dtype)
    return x if len(end) == 1 else ddim_step(denoise(x, end[0]), end[1], path)


def dpmpp_2m(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022): second-order multistep. Deterministic, one evaluation per step."""
    return _dpmpp_2m(denoise, x_1, ts, path, None)


def dpmpp_2m_sde(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, *, noise: Noise = torch.randn_like) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix); first order is `ddpm` with the variance of q(x_s | x_t, x_0)."""
    return _dpmpp_2m(denoise, x_1, ts, path, noise)


@torch.no_grad()
def _dpmpp_2m(denoise: Denoiser, x_1: Tensor, ts: Tensor, path: Path, noise: Noise | None) -> Tensor:
    x, x_0_before, h_before = x_1, None, None
    for t, s in pairwise(ts):
        (alpha_t, sigma_t, _, _), (alpha_s, sigma_s, _, _) = path(t), path(s)
        decay = (alpha_t * sigma_s) / (alpha_s * sigma_t)  # exp(-h) for a step h in log(alpha / sigma)
        h = -decay.log()  # infinite at alpha_t = 0 and sigma_s = 0, where the first-order step is exact
        x_0 = ahead = denoise(x, t).x_0
        if x_0_before is not None and torch.isfinite(h):
            ahead = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        if noise is None:
            x = sigma_s / sigma_t * x + alpha_s * (1 - decay) * ahead
        else:
            x = sigma_s / sigma_t * decay * x + alpha_s * (1 - decay**2) * ahead
            x = x + sigma_s * (1 - decay**2).sqrt() * noise(x) if s > 0 else x
        x_0_before, h_before = x_0, h
    return x


# The diffusion coefficient w(t) >= 0: the reverse-time SDE dx = (velocity + w eps / sigma) dt + sqrt(2 w) dW has the
# same marginals for any w (Ma et al. 2024, section 2). SBDM's w is infinite at alpha = 0, so its t is clamped.
DIFFUSION_FORMS = {
    "constant": lambda path, t, norm: norm * torch.ones_like(t),
    "sbdm": lambda path, t, norm: norm * half_diffusion(*path(t.clamp(1e-5, 1 - 1e-3))),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * t,
    "decreasing": lambda path, t, norm: 0.25 * (1 - norm * torch.cos(math.pi * t)) ** 2,
    "increasing_decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
}
Form = Literal[*DIFFUSION_FORMS]
LastStep = Literal["mean", "tweedie", "euler", "none"]


def sde_euler(
    denoise: Denoiser,
    x_1: Tensor,
    ts: Tensor,
    path: Path,
    *,
    noise: Noise = torch.randn_like,
    form: Form = "sigma",
    norm: float = 1.0,
    last_step: LastStep = "mean",
    last_step_size: float = 0.04,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE (Ma et al. 2024), with diffusion DIFFUSION_FORMS[form] scaled by `norm`.

    The last step, from t = last_step_size to the data, adds no noise: it follows the SDE's drift ("mean"), returns the
    predicted x_0 ("tweedie") or follows the ODE ("euler"). The other steps are spread over the remaining interval.
    With "none", the last step is like the others.
    """
    return _sde(denoise, x_1, ts, path, noise, form, norm, last_step, last_step_size, heun=False)


def sde_heun(
    denoise: Denoiser,
    x_1: Tensor,
    ts: Tensor,
    path: Path,
    *,
    noise: Noise = torch.randn_like,
    form: Form = "sigma",
    norm: float = 1.0,
    last_step: LastStep = "mean",
    last_step_size: float = 0.04,
) -> Tensor:
    """Like `sde_euler`, but adds the noise first, then applies the drift by Heun's method: two evaluations per step."""
    return _sde(denoise, x_1, ts, path, noise, form, norm, last_step, last_step_size, heun=True)


@torch.no_grad()
def _sde(denoise, x_1, ts, path, noise, form, norm, last_step, last_step_size, heun) -> Tensor:
    check(form, DIFFUSION_FORMS, "form")
    check(last_step, get_args(LastStep), "last_step")
    if last_step != "none":
        if not 0 < last_step_size < ts[0]:
            raise ValueError(f"last_step_size={last_step_size} is not in (0, {float(ts[0])}); use one such as 0.04")
        ts = ts[:-1]
        if len(ts) > 1:
            ts = last_step_size + (ts - ts[-1]) * (ts[0] - last_step_size) / (ts[0] - ts[-1])

    def eps_coefficient(now, t, h):  # w / sigma at time `now`, in the step of size h from t
        # above sigma / h, the step would remove more noise than x has; any w is valid, so it can be capped
        now = now.clamp(min=1e-5)
        return torch.minimum(DIFFUSION_FORMS[form](path, now, norm) / path.sigma(now), path.sigma(t) / h)

    def drift(prediction, now, t, h):  # -dx/dt without the noise
        return -prediction.velocity - eps_coefficient(now, t, h) * prediction.eps

    x = x_1
    for t, s in pairwise(ts):
        h = t - s
        if path.singular(s):
            x = ddim_step(denoise(x, t), s, path)
            continue
        added = (2 * h * path.sigma(t) * eps_coefficient(t, t, h)).sqrt() * noise(x)
        if heun:
            x = x + added
            slope = drift(denoise(x, t), t, t, h)
            x = x + h / 2 * (slope + drift(denoise(x + h * slope, s), s, t, h))
        else:
            x = x + h * drift(denoise(x, t), t, t, h) + added
    if last_step == "none":
        return x
    t = h = ts[-1]
    prediction = denoise(x, t)
    if last_step == "tweedie":
        return prediction.x_0
    return x + h * (drift(prediction, t, t, h) if last_step == "mean" else -prediction.velocity)


SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dopri5": dopri5,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "sde_euler": sde_euler,
    "sde_heun": sde_heun,
}
