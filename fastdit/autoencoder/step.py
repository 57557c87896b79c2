"""One training step of an autoencoder and, from discriminator.start on, of its discriminator."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.autoencoder.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    kl_loss,
    reconstruction_loss,
)
from fastdit.autoencoder.perceptual import Perceptual
from fastdit.distributed import Ranks, StepRandom, step_generator
from fastdit.training.ema import EMA
from fastdit.training.engine import TorchEngine
from fastdit.training.step import StepResult


@dataclass
class AutoencoderStep:
    """One step over this process's `accumulation * micro_batch` images of the global batch; never waits for the device.

    All random numbers come from (seed, step). The adversarial loss's weight is that of eq. 7 of Esser et al. 2021, for
    the gradients of the whole global batch. It is measured in the step before: then it is known when the first
    micro-batch needs it, and it depends neither on the number of processes nor on the micro-batch. It starts at 0.
    """

    config: AutoencoderConfig
    engine: TorchEngine  # of a Reconstruction
    critic: TorchEngine | None  # of a PatchDiscriminator
    ema: EMA
    perceptual: Perceptual | None
    ranks: Ranks
    latent_shape: tuple[int, int, int]
    micro_batch: int
    accumulation: int
    seed: int
    weight: Tensor  # 0-dim, on the device: of the adversarial loss

    def __post_init__(self):
        self.critic_ema = EMA(self.critic.master_parameters(), 0.0) if self.critic else None  # not used

    def __call__(self, pixels: Tensor, step: int, lr: float, critic_lr: float) -> StepResult:
        """pixels (n, 3, H, W) in [-1, 1], on the device; `step` counts from 0."""
        settings, own = self.config.loss, self.accumulation * self.micro_batch
        rows = slice(self.ranks.rank * own, (self.ranks.rank + 1) * own)
        random = StepRandom(step_generator(self.seed, step, pixels.device), rows, self.ranks.world * own)
        noise, module = random.randn(*self.latent_shape), self.engine.module
        judged = self.critic is not None and step + 1 >= self.config.discriminator.start
        last = [torch.zeros_like(module.last_layer, dtype=torch.float32) for _ in range(2 * judged)]
        parts: dict[str, Tensor] = {}  # sums over this process's images

        def add(**values: Tensor) -> None:
            for name, value in values.items():
                parts[name] = parts.get(name, 0) + value.detach().sum()

        for i in range(self.accumulation):
            part = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
            x = pixels[part]
            self.engine.boundary(last=i == self.accumulation - 1)
            with self.engine.autocast():
                output, mean, logvar = self.engine.forward(x, noise[part])
            loss = reconstruction_loss(settings.reconstruction, output, x)  # (n,)
            kl = kl_loss(mean, logvar, x[0].numel())
            add(reconstruction=loss, kl=kl)
            if self.perceptual is not None:
                with self.engine.autocast():
                    distance = self.perceptual(output, x)
                add(perceptual=distance)
                loss = loss + settings.perceptual_weight * distance
            [gradient] = torch.autograd.grad(loss.mean(), output)  # (n, 3, H, W)
            total = loss if module.frozen else loss + settings.kl_weight * kl
            if judged:
                adversarial = self._fool(output)
                [other] = torch.autograd.grad(adversarial.mean(), output)
                for own_sum, one in zip(last, (gradient, other), strict=True):
                    own_sum += torch.autograd.grad(output, module.last_layer, one, retain_graph=True)[0]
                gradient = gradient + self.weight * other
                add(adversarial=adversarial, **self._judge(x, output.detach(), i))
                total = total + self.weight * adversarial
            add(loss=total)
            surrogate = (output * gradient).sum()  # its gradient is that of all losses of the reconstruction
            self.engine.backward(surrogate if module.frozen else surrogate + settings.kl_weight * kl.mean())
        means = dict(zip(parts, self.ranks.mean(torch.stack([*parts.values()]) / own), strict=True))
        bad = ~torch.stack([*means.values()]).isfinite().all()
        if judged:  # one of the two alone must not take the step
            bad = bad | ~self.critic.gradient_norm().isfinite()
        grad_norm, skipped = self.engine.step(lr, bad, self.ema, step + 1)
        if judged:
            self.critic.step(critic_lr, skipped, self.critic_ema, step + 1)
            last = self.ranks.mean(torch.stack(last))
            weight = self.config.discriminator.weight * adaptive_weight(*last)
            means["adversarial_weight"] = self.weight.clone()
            self.weight.copy_(torch.where(skipped | ~weight.isfinite(), self.weight, weight))
        return StepResult({"loss": means.pop("loss"), **means}, grad_norm, skipped)

    def _fool(self, output: Tensor) -> Tensor:
        """The generator's loss (n,); no gradient reaches the discriminator's weights."""
        module = self.critic.module
        fixed = {name: parameter.detach() for name, parameter in module.named_parameters()}
        with self.critic.autocast():
            return generator_loss(functional_call(module, fixed, (output,)).float())

    def _judge(self, x: Tensor, output: Tensor, i: int) -> dict[str, Tensor]:
        """The discriminator's loss and its logits' means for images and reconstructions (n,), after its backward."""
        self.critic.boundary(last=i == self.accumulation - 1)
        with self.critic.autocast():
            logits = self.critic.forward(torch.cat([x, output])).float()
        real, fake = logits.chunk(2)
        loss = discriminator_loss(real, fake)
        self.critic.backward(loss.mean())
        return {"discriminator": loss, "logits_real": real.flatten(1).mean(1), "logits_fake": fake.flatten(1).mean(1)}
