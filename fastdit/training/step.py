"""One training step, from moments to moved weights: noise, loss, backward, optimiser, EMA."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.data.latents import sample_latents
from fastdit.distributed import Ranks, StepRandom
from fastdit.models.dit import drop_labels
from fastdit.training.ema import EMA
from fastdit.training.engine import DeepSpeedEngine, TorchEngine


@dataclass
class TrainStep:
    """A step over this process's `accumulation * micro_batch` images of the global batch; nothing waits for the device.

    All its random numbers come from (seed, step), so the step number alone is enough to repeat it.
    """

    engine: TorchEngine | DeepSpeedEngine
    ema: EMA
    objective: object
    ranks: Ranks
    latent_shape: tuple[int, int, int]  # (C, h, w)
    scale: float
    shift: float
    class_dropout: float
    null_label: int | None
    micro_batch: int
    accumulation: int
    seed: int

    def __call__(self, moments: Tensor, y: Tensor, step: int, lr: float) -> tuple[Tensor, Tensor]:
        """moments (n, 2C, h, w), y (n,) on the device, step from 0 -> mean loss and gradient norm, on the device."""
        total = torch.zeros((), device=moments.device)
        for i in range(self.accumulation):
            rows = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
            self.engine.boundary(last=i == self.accumulation - 1)
            loss = self.loss(moments[rows], y[rows], step, first=(self.ranks.rank * self.accumulation + i))
            self.engine.backward(loss)
            total += loss.detach() / self.accumulation
        grad_norm = self.engine.step(lr)
        self.ema.update(self.engine.master_parameters(), step + 1)
        return total, grad_norm

    def loss(self, moments: Tensor, y: Tensor, step: int, first: int) -> Tensor:
        """Mean loss of micro-batch number `first` of the global batch."""
        rows = slice(first * self.micro_batch, (first + 1) * self.micro_batch)
        global_batch = self.ranks.world * self.accumulation * self.micro_batch
        random = StepRandom(self.seed, step, rows, global_batch, moments.device)
        x_0 = sample_latents(moments, random.randn(*self.latent_shape), self.scale, self.shift)  # (n, C, h, w)
        y = drop_labels(y, random.rand(), self.class_dropout, self.null_label)
        t = self.objective.sample_t(random.rand())
        return self.objective.loss(self.engine, x_0, y, t, random.randn(*self.latent_shape)).per_sample.mean()
