"""Which times: the steps of a sampler, and the times of a training batch by inverse CDF of given uniforms.

t = 0 is the data and t = 1 the noise here too, so a logit-normal of positive mean trains more on noisy images
(Esser et al. 2024, arXiv 2403.03206, which shares this clock).
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from fastdit.diffusion.paths import NUM_TIMESTEPS


def respaced(spec: str | int, num_timesteps: int = NUM_TIMESTEPS) -> list[int]:
    """The ascending indices that a respacing keeps: "250" spread, "10,15,20" per section, "ddim50" by a stride."""
    spec = str(spec)
    if spec.startswith("ddim"):
        count = _positive(spec.removeprefix("ddim"), spec)
        strides = [n for n in range(1, num_timesteps + 1) if len(range(0, num_timesteps, n)) == count]
        if not strides:
            raise ValueError(f"steps={spec!r} has no whole stride through {num_timesteps} steps; use steps={count}")
        return list(range(0, num_timesteps, strides[0]))
    counts = [_positive(part, spec) for part in spec.split(",")]
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if count > size:
            raise ValueError(f"steps={spec!r}: a section of {size} steps cannot keep {count}; use at most {size}")
        stride = (size - 1) / max(count - 1, 1)
        # summed, not multiplied: a tie such as 49.5 then rounds as in the released code
        kept += [start + round(offset) for offset in accumulate([0.0] + [stride] * (count - 1))]
        start += size
    return kept


def _positive(text: str, spec: str) -> int:
    if not (text.strip().isdigit() and int(text) > 0):
        raise ValueError(f"steps={spec!r} is not a respacing; use a count such as 250, '10,15,20' or 'ddim50'")
    return int(text)


def uniform(u, mean, scale):
    return u


def logit_normal(u, mean, scale):
    return torch.sigmoid(mean + scale * torch.special.ndtri(u))


def mode(u, mean, scale):
    """Esser et al. 2024, eq. 20, from u to 1 - u so that t grows with it; scale > 0 favours the middle."""
    return u - scale * (torch.sin(math.pi / 2 * u) ** 2 - u)


def cosmap(u, mean, scale):
    """The times at which `linear` passes the log-SNRs of the cosine schedule (Esser et al. 2024, eq. 21)."""
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def shifted(t: Tensor, shift: float) -> Tensor:
    """The resolution shift (Esser et al. 2024, eq. 23): shift > 1 moves times towards the noise, 1 leaves them."""
    return shift * t / (1 + (shift - 1) * t)


TIME_DISTRIBUTIONS = {"uniform": uniform, "logit_normal": logit_normal, "mode": mode, "cosmap": cosmap}
