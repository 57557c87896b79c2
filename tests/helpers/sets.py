"""Small folders of latents, for tests of what comes when."""

from pathlib import Path

import numpy as np

from fastdit.data.latents import LatentSpec
from fastdit.data.manifest import Manifest
from helpers.shards import write_shards

SIZES = {"a": 7, "b": 40, "c": 23, "d": 12}
SPEC = LatentSpec((1, 1, 2), 0.5, 0.0, vae="vae", codec="0" * 64, image_size=2)


def write(folder: Path, size: int, start: int = 0, spec: LatentSpec = SPEC, classes: str = "xyz", **about) -> Manifest:
    """Latents whose first value is their number; its sign is that of the orientation."""
    names = Manifest(spec, about.pop("dtype", "float32"), tuple(classes), images=size, **about)
    shape = (names.orientations, 2 * spec.shape[0], *spec.shape[1:])
    signs = np.array([1.0, -1.0][: shape[0]], np.float32).reshape(-1, 1, 1, 1)
    samples = ((np.full(shape, start + i, np.float32) * signs, i % len(classes)) for i in range(size))
    return write_shards(samples, folder, names, shard_size=10)


def write_all(root: Path) -> Path:
    """The folders of SIZES; the first value of image i of folder k is 1000 (k + 1) + i."""
    for number, (name, size) in enumerate(SIZES.items()):
        write(root / name, size, start=1000 * (number + 1))
    return root
