"""One training step, from posterior moments to updated weights: noise, loss, backward, optimizer, EMA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit.data.features import class_token_of
from fastdit.data.latents import LatentSpec, sample_latents
from fastdit.diffusion.coupling import coupling_of, paired
from fastdit.diffusion.objectives import Objective
from fastdit.diffusion.timesteps import LossAwareTimes
from fastdit.distributed import Ranks, StepRandom, step_generator
from fastdit.models.class_token import join
from fastdit.models.dit import drop_labels
from fastdit.models.routing import Routing
from fastdit.training.alignment import Alignment, alignment_losses
from fastdit.training.ema import EMA
from fastdit.training.engine import Engine


class StepResult(NamedTuple):
    """0-dim tensors on the device, equal on all processes."""

    losses: dict[str, Tensor]  # means over the global batch: `loss` and, where it has several parts, each by its name
    grad_norm: Tensor
    skipped: Tensor  # bool: loss or gradient were not finite, so nothing was changed


@dataclass
class TrainStep:
    """One step over this process's `accumulation * micro_batch` images of the global batch; never waits for the device.

    All random numbers come from (seed, step), so a step can be repeated exactly.
    """

    engine: Engine
    ema: EMA
    objective: Objective
    ranks: Ranks
    latents: LatentSpec
    class_dropout: float
    null_label: int | None
    micro_batch: int
    accumulation: int
    seed: int
    times: LossAwareTimes | None = None  # draws the times instead of the objective
    averages: Sequence[EMA] = ()  # further averages, updated like `ema`
    alignments: Mapping[str, Alignment] = field(default_factory=dict)  # by name, see training/alignment.py
    routing: Routing | None = None

    def __call__(self, step: int, lr: float, moments: Tensor, y: Tensor, *targets: Tensor | None) -> StepResult:
        """moments (n, 2C, h, w), y (n,) and what follows in Batch, on the device; `step` counts from 0."""
        return self.run(step_generator(self.seed, step, moments.device), step, lr, moments, y, *targets)

    def run(
        self,
        generator: torch.Generator,
        step: int,
        lr: float | Tensor,
        moments: Tensor,
        y: Tensor,
        features: Tensor | None = None,
        class_token: Tensor | None = None,
    ) -> StepResult:
        """Like a call, with a generator that is already seeded for this step."""
        own = self.accumulation * self.micro_batch
        rows = slice(self.ranks.rank * own, (self.ranks.rank + 1) * own)
        random, model = StepRandom(generator, rows, self.ranks.world * own), self.engine.module
        posterior = random.randn(*self.latents.shape)
        latents = x_0 = sample_latents(moments, posterior, self.latents.scale, self.latents.shift)  # (n, C, h, w)
        if model.class_token is not None:
            x_0 = join(latents, class_token_of(features, class_token))  # (n, C + K, h, w)
        y = drop_labels(y, random.rand(), self.class_dropout, self.null_label)
        u, noise = random.rand(), random.randn(*model.state_shape)
        if coupling_of(self.objective) != "independent":  # in the global batch, so that the split changes nothing
            noise = paired(self.objective, self.ranks.gather(x_0), self.ranks.gather(noise))[rows]
        t, factors = (self.objective.sample_t(u), None) if self.times is None else self.times.sample(u)
        routes = None if self.routing is None else self.routing.draw(random.rand, model, step)
        fp8 = model.fp8
        losses: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        for i in range(self.accumulation):
            part = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
            self.engine.boundary(last=i == self.accumulation - 1)
            model.route = None if routes is None else routes.of(part)
            loss = self.objective.loss(self.engine, x_0[part], y[part], t[part], noise[part])
            per_sample = loss.per_sample
            weighted = per_sample if factors is None else factors[part].to(per_sample) * per_sample
            targets = None if features is None else features[part]
            aligned = alignment_losses(self.alignments, model, latents[part], targets)
            total = weighted.mean()
            for name, values in aligned.items():
                total = total + self.alignments[name].weight_at(step) * values.mean()
            self.engine.backward(total)
            if fp8 is not None:
                fp8.collect()
            losses.append(per_sample.detach() if factors is None else torch.stack([per_sample, weighted]).detach())
            for name, values in ((loss.parts if len(loss.parts) > 1 else {}) | aligned).items():
                parts.setdefault(name, []).append(values.detach())
        model.route = None
        losses = torch.cat(losses, dim=-1)
        if self.times is not None:
            seen = torch.stack([t, losses[0].to(t)], 1)
            seen = self.ranks.gather(seen)  # of the global batch, in one order for any world size
            self.times.update(*seen[seen.isfinite().all(1)].unbind(1))
            losses = losses[1]
        means = {"loss": losses.mean()} | {name: torch.cat(values).mean() for name, values in parts.items()}
        means = dict(zip(means, self.ranks.mean(torch.stack(list(means.values()))), strict=True))
        bad = ~means["loss"].isfinite()
        if fp8 is not None:
            bad = bad | fp8.not_finite(self.ranks)
        grad_norm, skipped = self.engine.step(lr, bad, self.ema, step + 1)
        if fp8 is not None:
            fp8.update(self.ranks, skipped)
        for average in self.averages:
            average.update(self.engine.master_parameters(), step + 1, skipped)
        return StepResult(means, grad_norm, skipped)

    def times_of(self, step: int) -> list[float]:
        """t of the samples of a step's global batch; [] for loss-aware times, which depend on their history."""
        if self.times is not None:
            return []
        count = self.ranks.world * self.accumulation * self.micro_batch
        random = StepRandom(step_generator(self.seed, step, self.ranks.device), slice(None), count)
        random.randn(*self.latents.shape), random.rand()  # drawn first, as in `run`
        return self.objective.sample_t(random.rand()).tolist()
