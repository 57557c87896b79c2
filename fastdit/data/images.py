"""Image folders, with one subfolder per class, to pixels in [-1, 1]. Center crop as in ADM (Dhariwal & Nichol 2021)."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    """Images under `root`, grouped by class: `paths` relative to it, `labels` as indices into sorted `class_names`."""

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


def list_images(root: str | Path) -> ImageFolder:
    """Lists root/<class>/**/<image>, with classes and paths sorted; hidden files and folders are ignored.

    Raises a ValueError if the folder is missing or empty, if there are images outside the class subfolders, or if a
    class subfolder has no images (it would silently shift the labels of the classes after it).
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"images={root} is not a folder; give a folder with one subfolder of images per class")
    entries = sorted(e.name for e in os.scandir(root) if not e.name.startswith("."))
    classes = [name for name in entries if (root / name).is_dir()]
    loose = [name for name in entries if name.lower().endswith(EXTENSIONS) and name not in classes]
    if loose:
        raise ValueError(
            f"images={root} has {len(loose)} images outside any class subfolder (the first is {loose[0]!r}); "
            "move them into one subfolder per class (a single subfolder for unconditional training)"
        )
    if not classes:
        raise ValueError(f"images={root} is empty; it needs one subfolder of images per class")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(_images_below(root, name))
        if not found:
            raise ValueError(
                f"images={root} has a class subfolder {name!r} without images; remove it, or add {'/'.join(EXTENSIONS)}"
            )
        paths += found
        labels += [label] * len(found)
    return ImageFolder(root, tuple(paths), tuple(labels), tuple(classes))


def _images_below(root: Path, name: str) -> list[str]:
    found = []
    for folder, subfolders, files in os.walk(root / name, followlinks=True):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        below = Path(folder).relative_to(root).as_posix()
        found += [f"{below}/{f}" for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    return found


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve (BOX) while the short side is at least 2 * size, resize it to `size` (BICUBIC), center-crop."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_crop(path: str | Path, size: int) -> np.ndarray:
    """Reads one image, converts it to RGB and crops it -> (size, size, 3) uint8.

    As in ADM, Pillow converts every mode (gray, palette, CMYK, alpha) to RGB, alpha is dropped, and the EXIF
    orientation is ignored. Raises a ValueError with the reason if the file cannot be read as an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transparent palettes, invalid EXIF data: the pixels are fine
            with Image.open(path) as image:
                return np.array(center_crop(image.convert("RGB"), size))  # a copy: torch expects a writable array
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds of errors on damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def to_pixels(image: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 pixels (..., 3, H, W) in [-1, 1]."""
    return image.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels (..., 3, H, W) in [-1, 1] -> uint8 (..., H, W, 3): clamp(127.5 x + 128, 0, 255), truncated."""
    return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1)


class Skipped:
    """Records the images that could not be read, and stops the run if there are too many.

    At most 1% of `total` may be skipped, or one image if that is more.
    """

    def __init__(self, total: int):
        self.total, self.allowed = total, max(1, total // 100)
        self.lines: list[str] = []  # path, tab, reason

    def add(self, path: str, reason: str) -> None:
        """Records an unreadable image; raises a ValueError if there are now too many."""
        self.lines.append(f"{path}\t{' '.join(reason.split())}")
        if len(self.lines) > self.allowed:
            raise ValueError(
                f"more than {self.allowed} of {self.total} images cannot be read (the last is {path}: {reason}); "
                "repair or remove them"
            )
