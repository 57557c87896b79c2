"""A small diffusers AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752) and its training on pixels.

The loss is L1 reconstruction plus a KL term that keeps the latents bounded.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdit.distributed import seed_of


def small_vae(
    image_size: int, block_out_channels: Sequence[int] = (8, 8, 16), latent_channels: int = 4, seed: int = 0
) -> torch.nn.Module:
    """An untrained AutoencoderKL with one block per resolution, `len(block_out_channels) - 1` halvings, no attention.

    (8, 8, 16) has 46k parameters and maps 32 x 32 images to 8 x 8 latents.
    """
    from diffusers import AutoencoderKL

    blocks = len(block_out_channels)
    with torch.random.fork_rng(devices=[]):  # do not change the global random state
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=image_size,
            mid_block_add_attention=False,
        )


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

    The learning rate warms up over the first 5% of the steps and decays linearly to 2% of `lr`.
    """
    generator = torch.Generator(pixels.device).manual_seed(seed_of(seed))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0, fused=True)
    vae.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / (steps / 20)) * max(0.02, 1 - step / steps)
        x = pixels[torch.randint(len(pixels), (batch_size,), generator=generator, device=pixels.device)]
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
    """Peak signal-to-noise ratio in dB of images (N, 3, H, W) in [-1, 1] decoded from the posterior mean."""
    parts = [(vae.decode(vae.encode(part).latent_dist.mode()).sample - part).square() for part in pixels.split(256)]
    return float(-10 * torch.log10(torch.cat(parts).mean() / 4))  # the pixel range is 2
