"""Taps read hidden tokens after a block, in training. The network knows nothing of who uses them.

Official parameters and their names stay as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdit.models.blocks import Pending


def settled(x: Tensor, pending: Pending | None) -> Tensor:
    """x + gate (branch + bias): the residual (N, T, D) with the branch that is not yet added to it."""
    if pending is None:
        return x
    branch, gate, bias = pending
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = branch.to(wide) if bias is None else branch.to(wide) + bias.to(wide)
    if gate is not None:
        gate = gate.to(wide)
        branch = (gate if gate.ndim == 3 else gate[:, None]) * branch
    return (x.to(wide) + branch).to(x.dtype)


class Tapped(NamedTuple):
    """What a tap has read: tokens (N, T, D) of the patches, or (N, K, D) of the patches `kept` (N, K) on a route."""

    tokens: Tensor
    kept: Tensor | None


class Tap(nn.Module):
    """Reads the tokens after block number `block` (from 1) and passes them through `projector`."""

    def __init__(self, block: int, projector: nn.Module | None = None):
        super().__init__()
        self.block = block
        self.projector = projector or nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.projector(tokens)
