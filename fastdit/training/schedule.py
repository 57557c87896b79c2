"""Learning-rate schedules: lr(step) = training.lr * warmup * factor, a pure function of the step, so resuming is exact.

The warmup is linear, (step + 1) / training.warmup_steps, and a decay starts where it ends. `step` counts from 0. A
schedule that decays follows training.steps, also when a resumed run changes it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from fastdit.registry import build, check_literals
from fastdit.schema import TrainingConfig


class Schedule(Protocol):
    def factor(self, step: int, steps: int, warmup: int) -> float:
        """What the peak learning rate is multiplied by in `step` (0 .. steps - 1) of a run with `warmup` steps."""


@dataclass(frozen=True)
class Constant:
    """factor = 1, as DiT and SiT were trained (Peebles & Xie 2022, arXiv 2212.09748)."""

    def factor(self, step: int, steps: int, warmup: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear:
    """factor = 1 - (1 - final) x, where x goes from 0 at the end of the warmup to 1 at training.steps."""

    final: float = 0.0  # learning rate at the end / peak

    def __post_init__(self):
        _check_final(self.final)

    def factor(self, step: int, steps: int, warmup: int) -> float:
        return 1 - (1 - self.final) * _progress(step, warmup, steps)


@dataclass(frozen=True)
class Cosine:
    """factor = final + (1 - final)(1 + cos(pi x)) / 2 with x as in `Linear`.

    Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, without restarts.
    """

    final: float = 0.0

    def __post_init__(self):
        _check_final(self.final)

    def factor(self, step: int, steps: int, warmup: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * _progress(step, warmup, steps))) / 2


@dataclass(frozen=True)
class InverseSqrt:
    """factor = min(1, sqrt(reference / t)) with t = step + 1; it does not depend on training.steps.

    Karras et al. 2024, arXiv 2312.02696. With reference = warmup it is the schedule of Vaswani et al. 2017,
    arXiv 1706.03762, eq. 3.
    """

    reference_steps: int = 0  # the decay starts here; 0: at the end of the warmup

    def __post_init__(self):
        if self.reference_steps < 0:
            raise ValueError(f"reference_steps={self.reference_steps} is out of range; use 0 for training.warmup_steps")

    def factor(self, step: int, steps: int, warmup: int) -> float:
        reference = self.reference_steps or warmup
        if not reference:
            raise ValueError("reference_steps=0 without a warmup; use a positive number, or set training.warmup_steps")
        return min(1.0, math.sqrt(reference / (step + 1)))


@dataclass(frozen=True)
class WarmupStableDecay:
    """factor = 1, and in the last part `decay` of the run final + (1 - final) shape(x), where x goes from 0 to 1 there.

    Hu et al. 2024 (MiniCPM), arXiv 2404.06395, Sec. 4; the shape 1 - sqrt(x) is that of Hägele et al. 2024,
    arXiv 2405.18392. Before the decay, a run can be lengthened without a change of its past.
    """

    decay: float = 0.2  # part of training.steps
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt"  # 1 - sqrt(x), 1 - x or (1 + cos(pi x)) / 2
    final: float = 0.0

    def __post_init__(self):
        check_literals(self)
        _check_final(self.final)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay} is out of range; use a part of the run in (0, 1], such as 0.2")

    def factor(self, step: int, steps: int, warmup: int) -> float:
        x = _progress(step, steps * (1 - self.decay), steps)
        shape = {"sqrt": 1 - math.sqrt(x), "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}[self.shape]
        return self.final + (1 - self.final) * shape


def learning_rates(settings: TrainingConfig) -> Callable[[int], float]:
    """The function from a step, counted from 0, to its learning rate; ValueError for options that are out of range."""
    key, peak, steps, warmup = "training.lr_schedule", settings.lr, settings.steps, settings.warmup_steps
    try:
        schedule = build(SCHEDULES, settings.lr_schedule, key)
        schedule.factor(0, steps, warmup)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(key) else f"{key}.{error}") from None

    def lr(step: int) -> float:
        rate = peak * min(1.0, (step + 1) / warmup) if warmup else peak
        return rate * schedule.factor(step, steps, warmup)

    return lr


def _progress(step: float, first: float, last: float) -> float:
    """0 until `first`, 1 from `last` on, linear between them."""
    return min(1.0, max(0.0, step - first) / max(last - first, 1e-9))


def _check_final(final: float) -> None:
    if not 0 <= final <= 1:
        raise ValueError(f"final={final} is out of range; use a part of the peak learning rate in [0, 1], such as 0.1")


SCHEDULES = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "inverse_sqrt": InverseSqrt,
    "wsd": WarmupStableDecay,
}
