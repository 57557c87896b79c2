"""Dropout without a generator: whether a value is kept is a hash of the noisy latent that the network was given.

A training step's noise is drawn from (seed, step, row of the global batch) outside the network, and differs for every
image and step; so does a hash of its bits. Masks are therefore new in each step and the same whenever that step is
repeated: after a resume, on another number of processes, in another micro-batch, in a block that activation
checkpointing runs again, and inside compiled regions, where no generator can be handed in. Nothing reads or moves a
random state. The price is some integer arithmetic per value, which a compiler fuses with its neighbours.

The hash is a 32-bit multiply-xorshift, done in int64 and masked, so that no product overflows.
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
    """Keys (*shape, N), one per place and image, each a function of that image's bits x (N, ...) and its place."""
    bits = x.detach().float().contiguous().view(torch.int32).flatten(1).long() & MASK  # (N, values)
    position = mix(torch.arange(bits.shape[1], device=x.device))
    image = mix(mix(bits ^ position).sum(1) & MASK)  # (N,)
    places = torch.arange(1, 1 + torch.Size(shape).numel(), device=x.device).view(*shape, 1)
    return mix(image ^ mix(places))


def dropout(x: Tensor, key: Tensor, share: float) -> Tensor:
    """x (N, T, D) with `share` of its values zero and the others divided by 1 - share; key (N,) of `dropout_keys`."""
    values = torch.arange(x.shape[1] * x.shape[2], device=x.device).view(x.shape[1:])
    kept = mix(mix(values) ^ key[:, None, None]) >= int(share * 2**32)  # (N, T, D)
    return x * kept.to(x.dtype) / (1 - share)
