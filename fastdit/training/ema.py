"""Exponential moving average of the weights, in fp32, over the tensors that the optimizer updates."""

import torch
from torch import Tensor

from fastdit.config import TrainingConfig


class EMA:
    """`average <- average + (1 - decay)(weights - average)`, starting from a copy of the weights.

    The tensors are the engine's fp32 master weights: the parameters themselves, or ZeRO's flat partitions of them, so
    no communication is needed. fp32, because at decay 0.9999 a bf16 average never moves.
    """

    def __init__(self, masters: list[Tensor], decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self.average = [tensor.detach().float().clone() for tensor in masters]

    @torch.no_grad()
    def update(self, masters: list[Tensor], step: int, skipped: Tensor) -> None:
        """Move toward `masters` after step number `step` (1 for the first), unless it was `skipped` (0-dim bool)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        weight = (1 - decay) * (~skipped).float()  # on the device: the host does not wait for `skipped`
        for own, master in zip(self.average, masters, strict=True):
            own.lerp_(master.detach().float(), weight)

    @torch.no_grad()
    def load(self, tensors: list[Tensor]) -> None:
        for own, loaded in zip(self.average, tensors, strict=True):
            own.copy_(loaded)


def too_young(settings: TrainingConfig, steps: int) -> str:
    """A warning where the average after `steps` still holds much of the random weights that it began with, else ""."""
    share = 0.0 if settings.ema_warmup or settings.init_from or not steps else settings.ema_decay**steps
    if share < 0.05:
        return ""
    return (
        f"warning: after {steps} steps at training.ema_decay={settings.ema_decay} the EMA is still {share:.0%} random "
        "weights: sample with --weights model, or train with training.ema_warmup=true or a smaller ema_decay"
    )
