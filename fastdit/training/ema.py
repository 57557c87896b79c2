"""Exponential moving average of the weights, in fp32, over the same tensors that the optimiser owns."""

import torch
from torch import Tensor


class EMA:
    """`average <- average + (1 - decay)(weights - average)`, from a copy of the weights at the start.

    The tensors are the engine's fp32 masters: the parameters themselves, or ZeRO's flat partitions of them, so no
    process communicates. fp32 because at decay 0.9999 a bf16 average never moves.
    """

    def __init__(self, masters: list[Tensor], decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self.average = [tensor.detach().float().clone() for tensor in masters]

    @torch.no_grad()
    def update(self, masters: list[Tensor], step: int) -> None:
        """Move towards `masters` after optimiser step number `step` (1 for the first)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.average, [tensor.detach().float() for tensor in masters], 1 - decay)

    @torch.no_grad()
    def load(self, tensors: list[Tensor]) -> None:
        for own, loaded in zip(self.average, tensors, strict=True):
            own.copy_(loaded)
