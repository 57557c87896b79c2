"""Deterministic dropout without a generator: the mask is a hash of the noisy latent that the network receives.

The noise of a training step is drawn outside the network from (seed, step, index in the global batch). It differs for
every image and step, and so does a hash of the noisy latent. Masks are therefore new in each step, and equal when the
step is repeated: after a resume, with another number of processes or micro-batch size, in a block recomputed by
activation checkpointing, and in compiled regions, which accept no generator. No random state is read or changed. The
cost is a few integer operations per value, which a compiler fuses into neighboring ops.

The hash is a 32-bit multiply-xorshift, computed in int64 and masked so that no product overflows.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (in int64) in which each output bit depends on every input bit."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK
    return x ^ (x >> 16)


def dropout_keys(x: Tensor, *shape: int) -> Tensor:
    """Keys (*shape, N), one per position in `shape` and image; a hash of the position and the bits of x (N, ...)."""
    bits = x.detach().float().contiguous().view(torch.int32).flatten(1).long() & MASK  # (N, values)
    index = mix(torch.arange(bits.shape[1], device=x.device))
    image = mix(mix(bits ^ index).sum(1) & MASK)  # (N,)
    positions = torch.arange(1, 1 + torch.Size(shape).numel(), device=x.device).view(*shape, 1)
    return mix(image ^ mix(positions))


def dropout(x: Tensor, key: Tensor, share: float) -> Tensor:
    """Zero a fraction `share` of x (N, T, D) and divide the rest by 1 - share; `key` (N,) is from `dropout_keys`."""
    values = torch.arange(x.shape[1] * x.shape[2], device=x.device).view(x.shape[1:])
    kept = mix(mix(values) ^ key[:, None, None]) >= int(share * 2**32)  # (N, T, D)
    return x * kept.to(x.dtype) / (1 - share)
