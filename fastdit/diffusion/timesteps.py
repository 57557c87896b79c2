"""Timesteps of samplers, and time distributions of training, which map uniforms by the inverse CDF.

t = 0 is data and t = 1 is noise, so a logit-normal with positive mean trains more on noisy images (Esser et al. 2024,
arXiv 2403.03206, which uses the same convention).
"""

import math
from itertools import accumulate

import torch
from torch import Tensor

from fastdit.diffusion.paths import NUM_TIMESTEPS


def respaced(spec: str | int, num_timesteps: int = NUM_TIMESTEPS) -> list[int]:
    """The ascending indices kept: "250" evenly spaced, "10,15,20" per section, "ddim50" with a constant stride."""
    spec = str(spec)
    if spec.startswith("ddim"):
        count = _positive(spec.removeprefix("ddim"), spec)
        strides = [n for n in range(1, num_timesteps + 1) if len(range(0, num_timesteps, n)) == count]
        if not strides:
            raise ValueError(f"steps={spec!r} has no integer stride through {num_timesteps} steps; use steps={count}")
        return list(range(0, num_timesteps, strides[0]))
    counts = [_positive(part, spec) for part in spec.split(",")]
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        if count > size:
            raise ValueError(f"steps={spec!r}: a section of {size} steps cannot keep {count}; use at most {size}")
        stride = (size - 1) / max(count - 1, 1)
        # accumulated, not multiplied, so that ties such as 49.5 round as in the released code
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
    """Esser et al. 2024, eq. 20, with 1 - u for u so that t increases with u; scale > 0 favors the middle."""
    return u - scale * (torch.sin(math.pi / 2 * u) ** 2 - u)


def cosmap(u, mean, scale):
    """The times at which `linear` has the log-SNRs of the cosine schedule (Esser et al. 2024, eq. 21)."""
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def shifted(t: Tensor, shift: float) -> Tensor:
    """The resolution shift (Esser et al. 2024, eq. 23): shift > 1 moves times toward noise, 1 is the identity."""
    return shift * t / (1 + (shift - 1) * t)


class LossAwareTimes:
    """Importance sampling of discrete timesteps, p proportional to sqrt(E[loss^2]) (Nichol & Dhariwal 2021).

    Intended for loss_type=kl, whose terms differ by orders of magnitude. Call `sample`, then `update` with the losses
    of the *global* batch, so that the loss history is the same on every process; checkpoints store it (`state_dict`).
    Sampling is uniform until every index has `history` losses.
    """

    def __init__(self, num_timesteps: int = NUM_TIMESTEPS, history: int = 10, uniform_share: float = 1e-3):
        self.uniform_share = uniform_share
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """The probability of each index (T,), on the CPU."""
        steps, history = self.losses.shape
        even = torch.full((steps,), 1 / steps, dtype=torch.float64)
        if (self.counts < history).any():
            return even
        root = (self.losses**2).mean(1).sqrt()
        return (1 - self.uniform_share) * root / root.sum() + self.uniform_share * even

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Uniforms (N,) in [0, 1) -> timesteps (N,), float64, and importance weights (N,) for an unbiased mean loss."""
        p = self.probabilities().to(u.device)
        i = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(max=len(p) - 1)
        return (i + 1).double() / len(p), 1 / (len(p) * p[i])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Records the unweighted losses (N,) at timesteps t (N,), replacing the oldest ones of each index."""
        indices = (t * len(self.counts)).round().long().cpu() - 1
        for i, loss in zip(indices.tolist(), losses.detach().double().cpu().tolist(), strict=True):
            self.losses[i, self.counts[i] % self.losses.shape[1]] = loss
            self.counts[i] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()


TIME_DISTRIBUTIONS = {"uniform": uniform, "logit_normal": logit_normal, "mode": mode, "cosmap": cosmap}
