"""What several tests of the latent pipeline start from: a small autoencoder and a folder of real images."""

from pathlib import Path

import torch
from PIL import Image


def tiny_vae(seed: int = 0, **options):
    """An AutoencoderKL of 44k random weights: 32 px images to 16 x 16 x 4 latents."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            **{
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "norm_num_groups": 4,
                "sample_size": 32,
                **options,
            }
        )


def write_digits(root: Path, count: int) -> Path:
    """scikit-learn's first `count` digits as 40 x 36 RGB PNGs in a subfolder per class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(count):
        folder = root / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * 15.9).astype("uint8")).convert("RGB")
        image.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return root
