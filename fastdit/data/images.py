"""A folder of images by class -> pixels in [-1, 1]; the centre crop is ADM's (Dhariwal & Nichol 2021)."""

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
    """Images under `root`, class by class: `paths` relative to it, `labels` as indices of the sorted `class_names`."""

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)


def list_images(root: str | Path) -> ImageFolder:
    """Lists root/<class>/**/<image>, classes and paths in sorted order; hidden files and folders are left out.

    ValueError when the folder is missing or empty, when images lie beside the class subfolders, and when a class
    subfolder holds no image (it would silently shift the labels of the classes after it).
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"images={root} is not a folder; name the folder that holds one subfolder of images per class")
    entries = sorted(e.name for e in os.scandir(root) if not e.name.startswith("."))
    classes = [name for name in entries if (root / name).is_dir()]
    loose = [name for name in entries if name.lower().endswith(EXTENSIONS) and name not in classes]
    if loose:
        raise ValueError(
            f"images={root} holds {len(loose)} images outside any class subfolder ({loose[0]!r} first); "
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
    """ADM's crop: halve with BOX while the shorter side is at least 2 size, BICUBIC to size, cut the middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_crop(path: str | Path, size: int) -> np.ndarray:
    """Reads, converts to RGB and crops one image -> (size, size, 3) uint8.

    As ADM does it: every mode (grey, palette, CMYK, alpha) through Pillow's RGB conversion, alpha dropped, the EXIF
    orientation not applied. ValueError with the reason when the file cannot be read as an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # palettes with transparency, odd EXIF blocks: the pixels are fine
            with Image.open(path) as image:
                return np.array(center_crop(image.convert("RGB"), size))  # a copy: writable, as torch wants it
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def to_pixels(image: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 pixels (..., 3, H, W) in [-1, 1]."""
    return image.movedim(-1, -3).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels (..., 3, H, W) in [-1, 1] -> uint8 (..., H, W, 3): clamp(127.5 x + 128, 0, 255), truncated."""
    return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1)


class Skipped:
    """Notes the images that could not be read, and stops the run when they are too many to be an accident.

    One image, or 1% of `total` where that is more, may be skipped.
    """

    def __init__(self, total: int):
        self.total, self.allowed = total, max(1, total // 100)
        self.lines: list[str] = []  # path, tab, reason

    def add(self, path: str, reason: str) -> None:
        """Notes one unreadable image; ValueError when it is one too many."""
        self.lines.append(f"{path}\t{' '.join(reason.split())}")
        if len(self.lines) > self.allowed:
            raise ValueError(
                f"more than {self.allowed} of {self.total} images cannot be read ({path}: {reason}, the last of them); "
                "repair or remove them"
            )
