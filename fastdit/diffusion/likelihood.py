"""Likelihood of data from the probability-flow ODE (Song et al. 2021), or from DDPM's variational bound.

Along dx/dt = velocity, d log p / dt = -div velocity. Hence log p_0(x_0) = log N(x_1; 0, 1) + the integral of the
divergence from t = 0 to 1. Hutchinson's estimator of the divergence is unbiased: E[probe . J probe] = trace J.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastdit.diffusion.guidance import Denoiser
from fastdit.diffusion.objectives import DDPM, Model, gaussian_kl, per_sample_mean
from fastdit.diffusion.paths import NUM_TIMESTEPS, Path
from fastdit.diffusion.samplers import Noise


@dataclass(frozen=True)
class Likelihood:
    """log p(x_0), its standard error over the probes (nan for one probe), and x_1, where the ODE ends."""

    nats: Tensor  # (N,)
    standard_error: Tensor  # (N,)
    x_1: Tensor  # (N, C, h, w)


def rademacher(x: Tensor) -> Tensor:
    """+1 or -1 with equal probability, in the shape and dtype of x."""
    return torch.randint_like(x, 2) * 2 - 1


def log_likelihood(
    denoise: Denoiser,
    x_0: Tensor,
    ts: Tensor,
    path: Path,
    *,
    probes: int = 1,
    probe: Callable[[Tensor], Tensor] = rademacher,
    method: str = "heun",
) -> Likelihood:
    """The likelihood of x_0 (N, C, h, w) under a denoiser's ODE, by Euler's or Heun's method on ascending times ts.

    Get ts from `objective.timesteps(steps).flip(0)`. Integration starts at ts[1] if the velocity is infinite at ts[0].
    The standard error includes only the probes. To estimate the discretization error, compare with twice the steps.
    """
    if method not in ("euler", "heun"):
        raise ValueError(f"method={method!r} is unknown, use euler or heun")
    if probes < 1 or len(ts) < 2 or ts[0] > ts[-1]:
        raise ValueError(f"probes={probes} with {len(ts)} times; use at least 1 probe and ascending times, data first")
    ts = ts[1:] if path.singular(ts[0]) else ts
    directions = [probe(x_0) for _ in range(probes)]

    def rates(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (N, C, h, w) and the probes' divergences (probes, N)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            velocity = denoise(x, t).velocity
            products = [torch.autograd.grad(velocity, x, d, retain_graph=True)[0] for d in directions]
        divergences = [(d * product).flatten(1).sum(1) for d, product in zip(directions, products, strict=True)]
        return velocity.detach(), torch.stack(divergences)

    x, gain = x_0, torch.zeros(probes, len(x_0), dtype=torch.float64, device=x_0.device)
    for t, s in pairwise(ts):
        velocity, divergence = rates(x, t)
        if method == "heun":
            ahead = rates(x + (s - t) * velocity, s)
            velocity, divergence = (velocity + ahead[0]) / 2, (divergence + ahead[1]) / 2
        x, gain = x + (s - t) * velocity, gain + (s - t) * divergence
    prior = -0.5 * (x.double() ** 2 + math.log(2 * math.pi)).flatten(1).sum(1)
    error = gain.std(0) / math.sqrt(probes) if probes > 1 else torch.full_like(prior, torch.nan)
    return Likelihood(prior + gain.mean(0), error, x)


def bits_per_dim(nats: Tensor, x: Tensor) -> Tensor:
    """Bits per dimension (N,) of log-densities in nats (N,) of x (N, ...)."""
    return -nats / (x[0].numel() * math.log(2))


@torch.no_grad()
def variational_bound(
    objective: DDPM, model: Model, x_0: Tensor, y: Tensor | None, *, noise: Noise = torch.randn_like
) -> dict[str, Tensor]:
    """DDPM's variational bound over the whole chain, and the mean squared error of eps at each timestep.

    Returns total (N,), prior (N,) and vlb (N, 1000) in bits per dimension, and mse (N, 1000). Evaluates the network
    once per timestep, each time with new `noise`.
    """
    if not hasattr(objective, "vlb"):
        raise ValueError(f"objective={type(objective).__name__} has no variational bound; use log_likelihood")
    path, terms, errors = objective.path, [], []
    for t in objective.timesteps(NUM_TIMESTEPS)[:-1].to(x_0.device):
        t = t.expand(len(x_0))
        eps = noise(x_0)
        x_t = path.q_sample(x_0, eps, t)
        prediction = objective.predict(model, x_t, t, y)
        terms.append(objective.vlb(prediction, x_0, x_t, t))
        errors.append(per_sample_mean((prediction.eps - eps) ** 2))
    alpha, sigma, _, _ = path.at(torch.ones(len(x_0), dtype=torch.float64, device=x_0.device), x_0)
    zero = torch.zeros_like(x_0)
    prior = per_sample_mean(gaussian_kl(alpha * x_0, 2 * sigma.log(), zero, zero)) / math.log(2)
    vlb, mse = torch.stack(terms[::-1], 1), torch.stack(errors[::-1], 1)  # column i is index i of the schedule
    return {"total": vlb.sum(1) + prior, "prior": prior, "vlb": vlb, "mse": mse}
