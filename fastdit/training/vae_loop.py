"""Training of a small autoencoder on pixels: L1 reconstruction and a KL term that keeps the latents bounded."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdit.distributed import seed_of


def train_vae(
    vae: torch.nn.Module,
    pixels: Tensor,
    *,
    steps: int,
    batch_size: int = 32,
    lr: float = 5e-3,
    kl_weight: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train in place on pixels (N, 3, H, W) in [-1, 1], then set `scaling_factor` to 1 / std of the latents.

    The learning rate warms up over a twentieth of the steps and falls linearly to 2%.
    """
    generator = torch.Generator(pixels.device).manual_seed(seed_of(seed))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0, fused=True)
    vae.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (steps / 20)) * max(0.02, 1 - step / steps)
        rows = torch.randint(len(pixels), (batch_size,), generator=generator, device=pixels.device)
        x = pixels[rows]
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / x[0].numel()  # nats per pixel value
        loss = (reconstruction - x).abs().mean() + kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step(step + 1, loss.item())
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.sample(generator) for part in pixels.split(256)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


@torch.no_grad()
def psnr(vae: torch.nn.Module, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the posterior mean's reconstruction, pixels (N, 3, H, W) in [-1, 1]."""
    parts = [(vae.decode(vae.encode(part).latent_dist.mode()).sample - part).square() for part in pixels.split(256)]
    return float(-10 * torch.log10(torch.cat(parts).mean() / 4))  # the range is 2 wide
