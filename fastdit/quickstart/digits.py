"""scikit-learn's digits as folders of images."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.data.images import load_crop
from fastdit.data.sources import list_images

HELD_OUT = 3  # every third image is not used to train the diffusion model, but to fit the judge


def write_digits(out: Path, size: int) -> dict[str, int]:
    """scikit-learn's 1,797 digits as RGB PNG files: every third to held_out/<digit>/, the others to images/<digit>/."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    counts = {"images": 0, "held_out": 0}
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "held_out" if i % HELD_OUT == 0 else "images"
        counts[split] += 1
        folder = out / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image * 255 / 16).round().astype(np.uint8))  # 16 gray levels, 8 x 8
        picture.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(folder / f"{i:04d}.png")
    return counts


def read_folder(root: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of a folder with one subfolder per class, as uint8 (N, H, W, 3), and their labels (N,)."""
    folder = list_images(root)
    return np.stack([load_crop(Path(root) / path, size) for path in folder.paths]), np.array(folder.labels)
