"""Noising paths: x_t = alpha(t) x_0 + sigma(t) eps, with data at t = 0 and noise at t = 1.

A path is a function of t that returns alpha, sigma and their derivatives with respect to t. The interpolants are those
of SiT (Ma et al. 2024, arXiv 2401.08740), whose time runs in the opposite direction. The DDPM noise schedules are
tables of 1000 alphas_cumprod (Ho et al. 2020; Nichol & Dhariwal 2021; Lin et al. 2023); index i is t = (i + 1) / 1000.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000  # of every discrete noise schedule, as in the released DDPM checkpoints

Schedule = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]  # t -> alpha, sigma, d alpha / dt, d sigma / dt


@dataclass(frozen=True)
class Path:
    """alpha, sigma and their derivatives for t of any shape, computed in float64 and returned in the dtype of t."""

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
        """Whether dx/dt is infinite at t, as at t = 0 of VP and of every DDPM schedule, where sigma ~ sqrt(t)."""
        return not torch.isfinite(self.d_sigma(t))

    def at(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four coefficients at times t (N,) or 0-dim, broadcast to x (N, ...)."""
        return tuple(broadcast(c, x) for c in self(t))

    def q_sample(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (N, ...) at times t (N,) or 0-dim."""
        alpha, sigma, _, _ = self.at(t, x_0)
        return alpha * x_0 + sigma * eps

    def posterior(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For s < t: coefficients of x_t and x_0 in the mean of q(x_s | x_t, x_0), its variance, that of q(x_t | x_s).

        On a DDPM schedule these equal the released tables (respaced if t and s are several steps apart; last is beta).
        """
        (alpha_t, sigma_t, _, _), (alpha_s, sigma_s, _, _) = self(t), self(s)
        alpha_ts = alpha_t / alpha_s
        variance_ts = sigma_t**2 - (alpha_ts * sigma_s) ** 2
        kept = (sigma_s / sigma_t) ** 2
        return alpha_ts * kept, alpha_s * variance_ts / sigma_t**2, variance_ts * kept, variance_ts


def broadcast(c: Tensor, x: Tensor) -> Tensor:
    """Reshapes a coefficient per sample (N,) to multiply x (N, ...), in the dtype of x; a 0-dim one is unchanged."""
    return c.to(x).view(-1, *[1] * (x.ndim - 1)) if c.ndim else c


def half_diffusion(alpha: Tensor, sigma: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> Tensor:
    """g^2 / 2 of the forward process dx = (alpha' / alpha) x dt + g dW that has the marginals of the path."""
    return sigma * d_sigma - d_alpha / alpha * sigma**2


def linear(t):
    one = torch.ones_like(t)
    return 1 - t, t, -one, one


def gvp(t):
    """A quarter circle at constant speed: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
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
    """The path of a float64 table with T steps: alpha = 1 at t = 0 and sqrt(alphas_cumprod[i]) at t = (i + 1) / T.

    Between these nodes, alpha is a cubic Hermite spline. The log-SNR is not interpolated, because it is infinite at
    t = 0 and, with zero terminal SNR, at t = 1. Near t = 0, sigma grows like sqrt(t), as in `vp`.
    """
    nodes = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.sqrt()])
    (slopes,) = torch.gradient(nodes)  # per step; one-sided at the ends
    steps, table = len(alphas_cumprod), torch.stack([nodes, slopes])
    cached = functools.cache(lambda device: table.to(device))

    @torch.compiler.assume_constant_result  # if traced, the table would be copied to the device in every step
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
    """alphas_cumprod of Nichol & Dhariwal 2021 ("squaredcos_cap_v2"): cos^2 with an offset and betas <= 0.999."""
    grid = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
    bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod((bar[1:] / bar[:-1]).clamp(min=1 - 0.999), 0)


def scaled_linear_table() -> Tensor:
    """alphas_cumprod of latent diffusion (Rombach et al. 2022): sqrt(beta) is linear."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2, 0)


def zero_terminal_snr_table() -> Tensor:
    """`scaled_linear_table` with sqrt(alphas_cumprod) rescaled to end at 0 and start as before (Lin et al. 2023)."""
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
