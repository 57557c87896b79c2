"""A class token that is denoised with the latent (REG: Wu et al. 2025, arXiv 2507.01467).

The D values of an encoder's class token fill further channels of the latent, so that objectives, samplers and guidance
need not know of them: the state is (N, C + K, h, w) with the smallest K for which K h w >= D. The network turns these
channels into one more token and predicts them with a linear of its own. What is left of the last channel is ignored.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_of(dim: int, sides: tuple[int, int]) -> int:
    """K, of a class token of `dim` values beside latents with sides (h, w)."""
    return math.ceil(dim / math.prod(sides))


def join(latents: Tensor, token: Tensor) -> Tensor:
    """Latents (N, C, h, w) and class tokens (N, D) -> state (N, C + K, h, w)."""
    sides, dim = latents.shape[2:], token.shape[1]
    channels = channels_of(dim, sides)
    padded = F.pad(token, (0, channels * math.prod(sides) - dim))
    return torch.cat([latents, padded.unflatten(1, (channels, *sides)).to(latents.dtype)], dim=1)


def split(state: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of `join`."""
    channels = channels_of(dim, state.shape[2:])
    return state[:, :-channels], state[:, -channels:].flatten(1)[:, :dim]


class ClassToken(nn.Module):
    """The embedding of a class token (N, D) and the linear that predicts it from its hidden token."""

    def __init__(self, dim: int, hidden_size: int):
        super().__init__()
        self.embed, self.head = nn.Linear(dim, hidden_size), nn.Linear(hidden_size, dim)
