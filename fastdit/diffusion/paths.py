"""Noising paths: x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 the data and t = 1 the noise.

A path is one function of t that returns alpha, sigma and their derivatives in t. The interpolants are those of SiT
(Ma et al. 2024, arXiv 2401.08740), read in this library's time (SiT's runs the other way). The DDPM schedules are
tables of 1000 alphas_cumprod (Ho et al. 2020; Nichol & Dhariwal 2021; Lin et al. 2023); index i is t = (i + 1) / 1000.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000  # of every discrete schedule: the clock that released DDPM checkpoints were trained on

Schedule = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]  # t -> alpha, sigma, d alpha / dt, d sigma / dt


@dataclass(frozen=True)
class Path:
    """alpha, sigma and their derivatives at times of any shape, computed in float64 and returned in the dtype of t."""

    schedule: Schedule

    def alpha(self, t: Tensor) -> Tensor:
        return self(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self(t)[1]

    def d_alpha(self, t: Tensor) -> Tensor:
        return self(t)[2]

    def d_sigma(self, t: Tensor) -> Tensor:
        return self(t)[3]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(c.to(t.dtype) for c in self.schedule(t.double()))

    def singular(self, t: Tensor) -> bool:
        """Whether dx/dt is infinite at t: sigma grows like sqrt(t) at t = 0 of VP and of every DDPM schedule."""
        return not torch.isfinite(self.d_sigma(t))

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four coefficients at times t (N,) or 0-dim, ready to multiply x (N, ...)."""
        return tuple(broadcast(c, x) for c in self(t))

    def q_sample(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (N, ...) at times t (N,) or 0-dim."""
        alpha, sigma, _, _ = self.at(t, x_0)
        return alpha * x_0 + sigma * eps

    def posterior(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q(x_s | x_t, x_0), s < t: the mean's factors of x_t and x_0, its variance, and the variance of q(x_t | x_s).

        On a DDPM schedule these are the released tables, respaced where t and s lie several steps apart; last is beta.
        """
        (alpha_t, sigma_t, _, _), (alpha_s, sigma_s, _, _) = self(t), self(s)
        alpha_ts = alpha_t / alpha_s
        variance_ts = sigma_t**2 - (alpha_ts * sigma_s) ** 2
        kept = (sigma_s / sigma_t) ** 2
        return alpha_ts * kept, alpha_s * variance_ts / sigma_t**2, variance_ts * kept, variance_ts


def broadcast(c: Tensor, x: Tensor) -> Tensor:
    """One coefficient per sample (N,), in the dtype of x (N, ...) and shaped to multiply it; a 0-dim one stays."""
    return c.to(x).view(-1, *[1] * (x.ndim - 1)) if c.ndim else c


def half_diffusion(alpha: Tensor, sigma: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> Tensor:
    """g^2 / 2 of the forward process dx = (alpha' / alpha) x dt + g dW whose marginals are the path's."""
    return sigma * d_sigma - d_alpha / alpha * sigma**2


def linear(t):
    one = torch.ones_like(t)
    return 1 - t, t, -one, one


def gvp(t):
    """The quarter circle: alpha^2 + sigma^2 = 1 at constant speed."""
    half_pi = math.pi / 2
    alpha, sigma = torch.cos(half_pi * t), torch.sin(half_pi * t)
    return alpha, sigma, -half_pi * sigma, half_pi * alpha


def vp(t, beta_min=0.1, beta_max=20.0):
    """The continuous limit of DDPM's linear schedule (Song et al. 2021); d sigma / dt is infinite at t = 0."""
    log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
    d_log_alpha = -0.5 * t * (beta_max - beta_min) - 0.5 * beta_min
    alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
    d_alpha = alpha * d_log_alpha
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma


def tabulated(alphas_cumprod: Tensor) -> Schedule:
    """A table of T steps, float64, as a path: alpha = 1 at t = 0 and sqrt(alphas_cumprod[i]) at t = (i + 1) / T.

    Between the nodes alpha is a cubic Hermite spline: alpha and not the log-SNR, because it is finite at both ends: no
    noise at t = 0 and, at zero terminal SNR, no signal at t = 1. Near t = 0 sigma grows like sqrt(t), as on `vp`.
    """
    nodes = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.sqrt()])
    (slopes,) = torch.gradient(nodes)  # per step; one-sided at the ends
    steps, table = len(alphas_cumprod), torch.stack([nodes, slopes])
    cached = functools.cache(lambda device: table.to(device))

    @torch.compiler.assume_constant_result  # traced, the table would be sent to the device at every step
    def on(device):
        return cached(device)

    def schedule(t):
        nodes, slopes = on(t.device)
        i = (t.detach() * steps).long().clamp(0, steps - 1)
        f = t * steps - i
        a_0, a_1, m_0, m_1 = nodes[i], nodes[i + 1], slopes[i], slopes[i + 1]
        c_2, c_3 = 3 * (a_1 - a_0) - 2 * m_0 - m_1, 2 * (a_0 - a_1) + m_0 + m_1
        alpha = (a_0 + f * (m_0 + f * (c_2 + f * c_3))).clamp(min=0)
        d_alpha = steps * (m_0 + f * (2 * c_2 + f * 3 * c_3))
        sigma = torch.sqrt((1 - alpha) * (1 + alpha))
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma

    return schedule


def linear_table() -> Tensor:
    """alphas_cumprod of Ho et al. 2020."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64), 0)


def cosine_table() -> Tensor:
    """alphas_cumprod of Nichol & Dhariwal 2021 ("squaredcos_cap_v2"): cos^2 with an offset, each beta at most 0.999."""
    grid = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
    bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod((bar[1:] / bar[:-1]).clamp(min=1 - 0.999), 0)


def scaled_linear_table() -> Tensor:
    """alphas_cumprod of latent diffusion (Rombach et al. 2022): sqrt(beta) runs linearly."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2, 0)


def zero_terminal_snr_table() -> Tensor:
    """`scaled_linear_table` with sqrt(alphas_cumprod) shifted to end at 0, its start kept (Lin et al. 2023)."""
    alphas = scaled_linear_table().sqrt()
    return ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2


SCHEDULES = {
    "linear": linear_table,
    "cosine": cosine_table,
    "scaled_linear": scaled_linear_table,
    "zero_terminal_snr": zero_terminal_snr_table,
}

INTERPOLANTS = {"linear": linear, "gvp": gvp, "vp": vp}

PATHS = {name: Path(schedule) for name, schedule in INTERPOLANTS.items()} | {
    f"ddpm_{name}": Path(tabulated(table())) for name, table in SCHEDULES.items()
}
