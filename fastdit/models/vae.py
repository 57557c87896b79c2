"""Small autoencoders: diffusers' AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752) from a few numbers."""

from collections.abc import Sequence

import torch


def small_vae(
    image_size: int, block_out_channels: Sequence[int] = (8, 8, 16), latent_channels: int = 4, seed: int = 0
) -> torch.nn.Module:
    """An untrained AutoencoderKL, one block a resolution: `len(block_out_channels) - 1` halvings, no attention.

    (8, 8, 16) makes 46k parameters and turns 32 x 32 images into 8 x 8 latents.
    """
    from diffusers import AutoencoderKL

    blocks = len(block_out_channels)
    with torch.random.fork_rng(devices=[]):  # the weights come from `seed`, the caller's generator stays as it is
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
