"""A network's prediction at x_t in every parameterization. Objectives return a `Prediction`; samplers use only that.

Given x_t, any of x_0, eps, v, velocity and score determines the others:
    x_t = alpha x_0 + sigma eps      velocity = dx_t/dt = alpha' x_0 + sigma' eps
    v = alpha eps - sigma x_0        score = -eps / sigma
(v: Salimans & Ho 2022; if alpha^2 + sigma^2 = 1, v = dx_t/dphi for the angle phi = arctan(sigma / alpha).)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.diffusion.paths import Path, broadcast


@dataclass(frozen=True)
class Prediction:
    """Tensors (N, C, h, w). They are linear in the network's output, so guidance can extrapolate each of them."""

    x_0: Tensor
    eps: Tensor
    velocity: Tensor
    log_variance_mix: Tensor | float | None = None  # 0: that of q(x_s | x_t, x_0), 1: log(beta); None: not predicted

    def rows(self, part: slice) -> "Prediction":
        """The prediction for a part of the batch."""
        values = (self.x_0, self.eps, self.velocity, self.log_variance_mix)
        return Prediction(*(v[part] if isinstance(v, Tensor) else v for v in values))


def from_eps(eps, x_t, alpha, sigma, d_alpha, d_sigma):
    return (x_t - sigma * eps) / alpha, eps


def from_x_0(x_0, x_t, alpha, sigma, d_alpha, d_sigma):
    return x_0, (x_t - alpha * x_0) / sigma


def from_v(v, x_t, alpha, sigma, d_alpha, d_sigma):
    square = alpha**2 + sigma**2
    return (alpha * x_t - sigma * v) / square, (sigma * x_t + alpha * v) / square


def from_velocity(velocity, x_t, alpha, sigma, d_alpha, d_sigma):
    determinant = alpha * d_sigma - sigma * d_alpha
    return (d_sigma * x_t - sigma * velocity) / determinant, (alpha * velocity - d_alpha * x_t) / determinant


def from_score(score, x_t, alpha, sigma, d_alpha, d_sigma):
    return from_eps(-sigma * score, x_t, alpha, sigma, d_alpha, d_sigma)


# name -> its conversion to x_0 and eps, and the conversion back from x_0 and eps
PREDICTIONS = {
    "eps": (from_eps, lambda x_0, eps, alpha, sigma, d_alpha, d_sigma: eps),
    "x_0": (from_x_0, lambda x_0, eps, alpha, sigma, d_alpha, d_sigma: x_0),
    "v": (from_v, lambda x_0, eps, alpha, sigma, d_alpha, d_sigma: alpha * eps - sigma * x_0),
    "velocity": (from_velocity, lambda x_0, eps, alpha, sigma, d_alpha, d_sigma: d_alpha * x_0 + d_sigma * eps),
    "score": (from_score, lambda x_0, eps, alpha, sigma, d_alpha, d_sigma: -eps / sigma),
}


def predicted(name: str, value: Tensor, x_t: Tensor, t: Tensor, path: Path, log_variance_mix=None) -> Prediction:
    """Converts `value` (N, C, h, w), the quantity `name` in PREDICTIONS, to a Prediction; t is (N,) or 0-dim."""
    coefficients = path.at(t, x_t)
    x_0, eps = PREDICTIONS[name][0](value, x_t, *coefficients)
    velocity = value if name == "velocity" else coefficients[2] * x_0 + coefficients[3] * eps
    return Prediction(x_0, eps, velocity, log_variance_mix)


def with_x_0(prediction: Prediction, x_0: Tensor, x_t: Tensor, t: Tensor, path: Path) -> Prediction:
    """The prediction with a new x_0 (N, C, h, w) and recomputed eps and velocity; at sigma = 0, eps is unchanged."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    eps = torch.where((sigma > 0).to(x_t.device), (x_t - alpha * x_0) / sigma, prediction.eps)
    return Prediction(x_0, eps, d_alpha * x_0 + d_sigma * eps, prediction.log_variance_mix)


def target(name: str, x_0: Tensor, eps: Tensor, t: Tensor, path: Path) -> Tensor:
    """The training target (N, C, h, w) of a network that predicts `name`."""
    return PREDICTIONS[name][1](x_0, eps, *path.at(t, x_0))


def reverse_step(prediction: Prediction, x_t: Tensor, t: Tensor, s: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """Mean (N, C, h, w) and log-variance of p(x_s | x_t), s < t (Ho et al. eq. 7; Nichol & Dhariwal eq. 15).

    q(x_s | x_t, x_0) has zero variance at s = 0. As in the released code, that of the step from 2t to t is used.
    """
    return Step.between(t, s, path, x_t).distribution(prediction, x_t)


@dataclass(frozen=True)
class Step:
    """The coefficients of a reverse step from x_t to x_s, broadcast to x (N, ...)."""

    from_x_t: Tensor
    from_x_0: Tensor
    log_variance: Tensor  # of q(x_s | x_t, x_0)
    log_beta: Tensor  # of q(x_t | x_s)

    @classmethod
    def between(cls, t: Tensor, s: Tensor, path: Path, x: Tensor) -> "Step":
        from_x_t, from_x_0, variance, beta = path.posterior(t, s)
        variance = torch.where(s > 0, variance, path.posterior(2 * t - s, t)[2])
        return cls(*(broadcast(c, x) for c in (from_x_t, from_x_0, variance.log(), beta.log())))

    def distribution(self, prediction: Prediction, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, C, h, w) and log-variance of p(x_s | x_t) for a prediction."""
        mean = self.from_x_t * x_t + self.from_x_0 * prediction.x_0
        mix = 0.0 if prediction.log_variance_mix is None else prediction.log_variance_mix
        return mean, mix * self.log_beta + (1 - mix) * self.log_variance
