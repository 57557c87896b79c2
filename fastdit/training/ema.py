"""Moving averages of the weights, in fp32, over the tensors that the optimizer updates.

`EMA` forgets exponentially. `PowerAverage` widens with the step (Karras et al. 2024, arXiv 2312.02696, Sec. 3): at step
t it weighs the weights of step s by p(s) = (gamma + 1) s^gamma / t^(gamma + 1). Its width is the standard deviation of
p divided by t, here `std`. training/posthoc.py rebuilds any other width from several of them.
"""

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import counted
from fastdit.schema import MAX_EMA_STD, TrainingConfig

AVERAGES = "averages"  # folder of a run; training/posthoc.py describes it


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class EMA:
    """`average <- average + (1 - decay)(weights - average)`, starting from a copy of the weights.

    The tensors are the engine's fp32 master weights: the parameters themselves, or ZeRO's flat partitions of them, so
    no communication is needed. fp32, because at decay 0.9999 a bf16 average never moves.
    """

    def __init__(self, masters: list[Tensor], decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self.average = [tensor.detach().float().clone() for tensor in masters]
        # 1 - decay, on the device: a replayed CUDA graph reads its new value
        self.weight = torch.zeros((), device=self.average[0].device)

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def set_step(self, step: int) -> None:
        """Set the decay of step number `step`. A replayed CUDA graph reads what was set before."""
        if not capturing():
            self.weight.fill_(1 - self.decay_at(step))

    @torch.no_grad()
    def update(self, masters: list[Tensor], step: int, skipped: Tensor) -> None:
        """Move toward `masters` after step number `step` (1 for the first), unless it was `skipped` (0-dim bool)."""
        self.set_step(step)
        weight = self.weight * (~skipped).float()  # on the device: the host does not wait for `skipped`
        for own, master in zip(self.average, masters, strict=True):
            own.lerp_(master.detach().float(), weight)

    @torch.no_grad()
    def load(self, tensors: list[Tensor]) -> None:
        for own, loaded in zip(self.average, tensors, strict=True):
            own.copy_(loaded)


class PowerAverage(EMA):
    """The average with the power-function profile of relative width `std`; its first update copies the weights."""

    def __init__(self, masters: list[Tensor], std: float):
        super().__init__(masters, decay=0.0)
        self.std, self.exponent = std, exponent(std)
        self.name = f"power-{width_name(std)}"  # of its file

    def decay_at(self, step: int) -> float:
        return power_decay(self.exponent, step)


def exponent(std: float) -> float:
    """gamma of the power function with relative standard deviation `std`; ValueError outside (0, 0.2887].

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma. 0.2887 = 12^-0.5 belongs to gamma = 0, a
    uniform average.
    """
    if not 0 < std <= MAX_EMA_STD:
        raise ValueError(f"std={std} is out of range; use a width between 0 and {MAX_EMA_STD:.4f}, such as 0.1")
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def power_decay(gamma: float, t_next: float, t_delta: float = 1) -> float:
    """The decay of an update that ends at time `t_next` and begins `t_delta` before: (1 - t_delta/t_next)^(gamma+1)."""
    return (1 - t_delta / t_next) ** (gamma + 1)


def width_name(std: float) -> str:
    """A width in a file name: 0.050, or all digits where it has more than three."""
    return f"{std:.3f}" if float(f"{std:.3f}") == std else repr(std)


def random_share(settings: TrainingConfig, steps: int) -> float:
    """The part of the average after `steps` that is still the random weights that it began with."""
    return 0.0 if settings.ema_warmup or settings.init_from or not steps else settings.ema_decay**steps


def too_young(settings: TrainingConfig, steps: int) -> str:
    """A warning where the average after `steps` still holds much of the random weights that it began with, else ""."""
    share = random_share(settings, steps)
    if share < 0.05:
        return ""
    return (
        f"warning: after {counted(steps, 'step')} at training.ema_decay={settings.ema_decay} the EMA is still "
        f"{share:.0%} random weights: sample with --weights model, or train with training.ema_warmup=true or a "
        "smaller ema_decay"
    )
