"""Three plain sampling loops as a reference: a network call and a few tensor operations per step.

`network(x (2N, C, h, w), time (2N,), y (2N,)) -> (2N, 2C, h, w)` is evaluated on the batch doubled for classifier-free
guidance. DDPM as facebookresearch/DiT samples: guidance on the first 3 channels, tables in numpy, moved at each lookup.
Heun as SiT integrates its ODE from noise (0) to data (1). DPM-Solver++(2M) from its paper (Lu et al. 2022, algorithm
2).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.step.reference import BETAS, PlainDDPM

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)


def guided(network: Network, x: Tensor, time: float, y: Tensor, null: int, scale: float, channels: int) -> Tensor:
    """(N, 2C, h, w): the first `channels` guided, the others conditional on y only."""
    time = torch.full((2 * len(x),), time, device=x.device)
    both = network(torch.cat([x, x]), time, torch.cat([y, torch.full_like(y, null)]))
    strong, weak = both.chunk(2)
    blended = weak[:, :channels] + scale * (strong[:, :channels] - weak[:, :channels])
    return torch.cat([blended, strong[:, channels:]], dim=1)


@torch.no_grad()
def ddpm(network: Network, x: Tensor, y: Tensor, null: int, kept: list[int], noise, scale: float = 1.5) -> Tensor:
    """Ancestral sampling over the ascending indices `kept`, variance learned; `noise(x)` is drawn at every step."""
    bar = ALPHAS_CUMPROD[kept]
    diffusion = PlainDDPM(tables=None, betas=1 - bar / np.append(1.0, bar[:-1]))
    for i in range(len(kept) - 1, -1, -1):
        index = torch.full((len(x),), i, device=x.device)
        eps, raw = guided(network, x, float(kept[i]), y, null, scale, 3).chunk(2, dim=1)
        part = (raw + 1) / 2
        log = part * diffusion.at("log_beta", index) + (1 - part) * diffusion.at("log_posterior", index)
        x_0 = diffusion.at("x_0_of_x_t", index) * x - diffusion.at("x_0_of_eps", index) * eps
        x = diffusion.at("mean_of_x_0", index) * x_0 + diffusion.at("mean_of_x_t", index) * x
        if i > 0:
            x = x + torch.exp(0.5 * log) * noise(x)
    return x


@torch.no_grad()
def heun(network: Network, x: Tensor, y: Tensor, null: int, steps: int, scale: float = 1.5) -> Tensor:
    channels = x.shape[1]

    def velocity(x: Tensor, time: float) -> Tensor:
        return guided(network, x, time, y, null, scale, channels)[:, :channels]

    for i in range(steps):
        first = velocity(x, i / steps)
        x, ahead = x + first / steps, x
        x = ahead + (first + velocity(x, (i + 1) / steps)) / (2 * steps)
    return x


@torch.no_grad()
def dpmpp_2m(network: Network, x: Tensor, y: Tensor, null: int, kept: list[int], scale: float = 1.5) -> Tensor:
    """Over the ascending indices `kept` to the data; the last step is of first order."""
    channels, bar = x.shape[1], ALPHAS_CUMPROD
    before, h_before = None, None
    for i, index in reversed(list(enumerate(kept))):
        alpha, sigma = np.sqrt(bar[index]), np.sqrt(1 - bar[index])
        eps = guided(network, x, float(index), y, null, scale, channels)[:, :channels]
        x_0 = (x - float(sigma) * eps) / float(alpha)
        if i == 0:
            return x_0
        alpha_s, sigma_s = np.sqrt(bar[kept[i - 1]]), np.sqrt(1 - bar[kept[i - 1]])
        h = float(np.log(alpha_s / sigma_s) - np.log(alpha / sigma))
        ahead = x_0 if before is None else x_0 + h / (2 * h_before) * (x_0 - before)
        x = float(sigma_s / sigma) * x - float(alpha_s * np.expm1(-h)) * ahead
        before, h_before = x_0, h
    return x
