"""One training step, from moments to moved weights: noise, loss, backward, optimiser, EMA."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdit.data.latents import sample_latents
from fastdit.diffusion.timesteps import LossAwareTimes
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
    times: LossAwareTimes | None = None  # draws the times instead of the objective
    seen: list[Tensor] = field(default_factory=list)  # (n, 2) times and losses of this step's micro-batches, for it

    def __call__(self, moments: Tensor, y: Tensor, step: int, lr: float) -> tuple[Tensor, Tensor]:
        """moments (n, 2C, h, w), y (n,) on the device, step from 0 -> mean loss and gradient norm, on the device."""
        total = torch.zeros((), device=moments.device)
        for i in range(self.accumulation):
            rows = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
            self.engine.boundary(last=i == self.accumulation - 1)
            loss = self.loss(moments[rows], y[rows], step, first=(self.ranks.rank * self.accumulation + i))
            self.engine.backward(loss)
            total += loss.detach() / self.accumulation
        if self.times is not None:
            seen = self.ranks.gather(torch.cat(self.seen))  # (global batch, 2), in one order on any world size
            self.times.update(*seen.unbind(1))
            self.seen.clear()
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
        u, noise = random.rand(), random.randn(*self.latent_shape)
        t, factors = (self.objective.sample_t(u), None) if self.times is None else self.times.sample(u)
        losses = self.objective.loss(self.engine, x_0, y, t, noise).per_sample
        if factors is None:
            return losses.mean()
        self.seen.append(torch.stack([t, losses.detach().to(t)], 1))
        return (factors.to(losses) * losses).mean()
