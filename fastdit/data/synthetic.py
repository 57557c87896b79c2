"""Generated latents, any number of them and without a disk, for benchmarks and smoke tests.

data.shards=synthetic:IMAGES/CxHxW/CLASSES: image i has class i mod CLASSES; without CLASSES there are none, and
synthetic:IMAGES is short for 4x32x32 and 1000. The moments of image i are a function of (IMAGES, i): normal, so that
scaled latents have mean 0 and deviation 1; with three channels, pixels without an autoencoder, uniform in [-1, 1].
"""

import math
import re
from pathlib import Path

import numpy as np

from fastdit.data.autoencoders import NO_VAE, Pixels, fingerprint
from fastdit.data.latents import LatentSpec
from fastdit.data.manifest import DTYPES, SAMPLE, Manifest
from fastdit.schema import SD_VAE

PREFIX = "synthetic:"
MOST, MOST_LISTED, MOST_CLASSES = 1 << 50, 1 << 24, 100_000
SD_SCALE, SD_DOWNSAMPLE = 0.18215, 8
MEAN, DEVIATION = 0.8, 0.6  # of the posterior, scaled: the deviation of the means, and the posterior's own


class Synthetic(Manifest):
    """The manifest of generated latents. `images` is their number; the folder is the text that describes them."""

    def __len__(self) -> int:
        return self.images

    def index(self) -> np.ndarray:
        """SAMPLE rows (n,) that name no place; ValueError for more than MOST_LISTED."""
        if len(self) > MOST_LISTED:
            raise ValueError(f"{self.folder} has too many images to list, which training alone does not need; use at "
                             f"most {PREFIX}{MOST_LISTED} here")  # fmt: skip
        rows = np.zeros(len(self), SAMPLE)
        rows["key"] = np.arange(len(self))
        rows["label"] = self.labels(rows["key"])
        return rows

    def check_files(self, one: int, size: str) -> None:
        """There are none."""

    def keys(self, start: int, count: int) -> np.ndarray:
        """The images (count,) at positions from `start` on, in every epoch in the order of their numbers."""
        return (start % len(self) + np.arange(count, dtype=np.uint64)) % np.uint64(len(self))

    def others(self, fraction: float) -> "Synthetic":
        """Further images, a fraction as many, for the validation loss."""
        count = min(max(1, round(fraction * len(self))), MOST_LISTED)
        return synthetic(f"{PREFIX}{count}/{'x'.join(map(str, self.latents.shape))}/{self.num_classes}")

    def labels(self, keys: np.ndarray) -> np.ndarray:
        """(n,) int64."""
        return keys.astype(np.int64) % max(self.num_classes, 1)

    def moments(self, keys: np.ndarray, mirrored: bool = False) -> np.ndarray:
        """(n, 2C, h, w) float32, unscaled: mean, then standard deviation."""
        channels, *sides = self.latents.shape
        out = np.zeros((len(keys), 2 * channels, *sides), DTYPES[self.dtype])
        for i, key in enumerate(keys):
            generator = np.random.Generator(np.random.Philox(key=[self.images, int(key)]))
            mean, std = out[i, :channels], out[i, channels:]
            if self.latents.are_pixels:
                generator.random(out=mean, dtype=np.float32)
                mean *= 2
                mean -= 1
            else:
                generator.standard_normal(out=mean, dtype=np.float32)
                mean *= MEAN / SD_SCALE
                std[:] = DEVIATION / SD_SCALE
        return out[..., ::-1].copy() if mirrored else out


def synthetic(text: str | Path) -> Synthetic:
    """The latents that a text such as synthetic:50000/3x32x32/10 describes; ValueError for one of another form."""
    n = r"\d{1,18}|\d{1,3}(?:_\d{3}){1,5}"
    found = re.fullmatch(rf"{PREFIX}({n})(?:/({n})x({n})x({n})(?:/({n}))?)?", str(text), re.ASCII)
    images, *shape, classes = (int(number or 0) for number in found.groups()) if found else [0] * 5
    if not any(shape):
        shape, classes = [4, 32, 32], 1000
    if not (0 < images < MOST and classes <= MOST_CLASSES):
        raise ValueError(f"data.shards={text} is not {PREFIX}IMAGES/CxHxW/CLASSES; use for example "
                         f"{PREFIX}1281167/4x32x32/1000")  # fmt: skip
    channels, height, width = shape
    pixels = channels == 3
    factor = 1 if pixels else SD_DOWNSAMPLE
    size = factor * width if width == height else (factor * width, factor * height)
    about = (1.0, 0.0, NO_VAE, fingerprint(Pixels()), size, "float32") if pixels else (SD_SCALE, 0.0, SD_VAE, "", size)
    deviation = math.sqrt(1 / 3) if pixels else math.hypot(MEAN, DEVIATION)
    return Synthetic(
        LatentSpec((channels, height, width), *about),
        "float32",
        tuple(map(str, range(classes))),
        images=images,
        source="generated latents",
        class_counts=tuple(images // classes + (label < images % classes) for label in range(classes)),
        channel_mean=(0.0,) * channels,
        channel_std=(deviation,) * channels,
        index_sha256=str(text),
        folder=Path(text),
    )
