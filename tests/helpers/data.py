"""A small autoencoder, a folder of images and a set of latents."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdit.data.latents import LatentSpec
from fastdit.data.manifest import Manifest
from fastdit.files import sealed
from helpers.shards import write_shards


def edit_manifest(folder: Path, *replaced: str, **values) -> None:
    """Sets entries of manifest.json, or replaces one text by another, and makes its digest right."""
    path = folder / "manifest.json"
    text = path.read_text()
    if replaced:
        assert replaced[0] in text
        text = text.replace(*replaced)
    path.write_text(json.dumps(sealed(json.loads(text) | values)))


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


def small_vae(size: int = 32, channels: tuple[int, ...] = (8, 8, 16), seed: int = 0):
    """The quickstart's autoencoder, with random weights."""
    from fastdit.autoencoder.config import NetworkConfig
    from fastdit.autoencoder.network import build_autoencoder

    return build_autoencoder(NetworkConfig(channels, layers=1, norm_groups=4, attention=False), size, seed)


def write_digits(root: Path, count: int) -> Path:
    """The first `count` digits of scikit-learn as 40 x 36 RGB PNGs, in one subfolder per class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(count):
        folder = root / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[i] * 15.9).astype("uint8")).convert("RGB")
        image.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return root


def write_cerebras(root: Path, means: np.ndarray, deviations: np.ndarray, labels: Iterable[int]) -> Path:
    """Latents as the Cerebras model zoo writes them: a file per image, with the mean and the log of the variance."""
    for i, (mean, deviation, label) in enumerate(zip(means, deviations, labels, strict=True)):
        path = root / "train" / f"n0{label}" / f"{i:03d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        both = np.concatenate([mean, 2 * np.log(deviation)])
        paths = {"src_path": f"/images/{path.name}", "dest_path": f"/latents/{path.name}"}
        np.savez(path, **paths, label=np.int32(label), vae_output=both)
    return root / "train"


def make_shards(out, spread: float = 5.0, scale: float = 0.18215):
    """Latents whose posterior means have standard deviation `spread` and whose posteriors have 2.

    By default the scaled latents have sqrt(5^2 + 2^2) x 0.18215 = 0.98.
    """
    rng = np.random.default_rng(0)
    latents = LatentSpec((4, 8, 8), scale, 0.0, vae="vae", codec="0" * 64, image_size=16)
    about = Manifest(latents, "float16", class_names=tuple("abc"), images=40)

    def samples():
        for i in range(40):
            mean = rng.normal(0, spread, (4, 8, 8))
            one = np.concatenate([mean, np.full((4, 8, 8), 2.0)])
            yield np.stack([one, one[..., ::-1]]), i % 3

    return write_shards(samples(), out, about, shard_size=25)
