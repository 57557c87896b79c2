"""Image folders, with one subfolder per class, to pixels in [-1, 1]. Center crop as in ADM (Dhariwal & Nichol 2021)."""

import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga",
              ".tif", ".tiff", ".webp")  # fmt: skip
# the only decoders that a file may start, whatever its name is: Pillow would also run Ghostscript on PostScript
Image.init()
FORMATS = tuple({"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"} & Image.OPEN.keys())


@dataclass(frozen=True)
class ImageFolder:
    """Images under `root`, grouped by class: `paths` relative to it, `labels` as indices into sorted `class_names`.

    `ignored`: path, tab, reason of every other file in the class subfolders, hidden ones excepted.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)


def list_images(root: str | Path) -> ImageFolder:
    """Lists root/<class>/**/<image>, with classes and paths sorted; hidden files and folders are ignored.

    Symbolic links are followed, but no folder is visited twice. Raises a ValueError if a folder is missing, empty or
    cannot be read, if there are images outside the class subfolders, or if a class subfolder has no images (it would
    silently shift the labels of the classes after it).
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"images={root} is not a folder; give a folder with one subfolder of images per class")
    try:
        entries = sorted(e.name for e in os.scandir(root) if not e.name.startswith("."))
    except OSError as error:
        raise _unreadable(error) from error
    classes = [name for name in entries if (root / name).is_dir()]
    loose = [name for name in entries if name.lower().endswith(EXTENSIONS) and name not in classes]
    if loose:
        raise ValueError(
            f"images={root} has {len(loose)} images outside any class subfolder (the first is {loose[0]!r}); "
            "move them into one subfolder per class (a single subfolder for unconditional training)"
        )
    if not classes:
        raise ValueError(f"images={root} is empty; it needs one subfolder of images per class")
    paths, labels, ignored, visited = [], [], [], set()
    for label, name in enumerate(classes):
        found, others = _files_below(root, name, visited)
        ignored += others
        if not found:
            raise ValueError(
                f"images={root} has a class subfolder {name!r} without images; remove it, or add {'/'.join(EXTENSIONS)}"
            )
        paths += found
        labels += [label] * len(found)
    return ImageFolder(root, tuple(paths), tuple(labels), tuple(classes), tuple(ignored))


def remarks(folder: ImageFolder) -> list[str]:
    """What a user should know about a folder before it is extracted, one line each."""
    lines = []
    if folder.ignored:
        kinds = Counter(line.split("\t")[1] for line in folder.ignored)
        counts = ", ".join(f"{count} x {reason}" for reason, count in kinds.most_common(5))
        lines.append(
            f"ignored {len(folder.ignored)} files that are not images ({counts}); they are named in skipped.txt"
        )
    names = folder.class_names
    if all(name.isdigit() for name in names) and [*map(int, names)] != sorted(map(int, names)):
        order = ", ".join(names[:4])
        lines.append(
            f"class folders are sorted as text: label 0, 1, 2, ... are {order}, ...; pad them with zeros to 00, 01"
        )
    return lines


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f"{error.filename} cannot be read ({error.strerror}); make it readable, or remove it")


def _files_below(root: Path, name: str, visited: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """The images below root/name and the ignored files with their reasons, sorted; `visited`: folders seen so far."""

    def stop(error: OSError) -> None:
        raise _unreadable(error)

    found, ignored = [], []
    for folder, subfolders, files in os.walk(root / name, followlinks=True, onerror=stop):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above, or to one of another class
            subfolders.clear()
            ignored.append(
                f"{Path(folder).relative_to(root).as_posix()}\ta second path to a folder that was already read"
            )
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        below = Path(folder).relative_to(root).as_posix()
        for file in sorted(files):
            path = f"{below}/{file}"
            if file.startswith("."):
                continue
            if not os.path.isfile(root / path):  # a pipe would block whoever opens it
                ignored.append(f"{path}\tnot a regular file")
            elif file.lower().endswith(EXTENSIONS):
                found.append(path)
            else:
                ignored.append(f"{path}\tname ends in {Path(file).suffix.lower() or 'no suffix'}")
    return sorted(found), ignored


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve (BOX) while the short side is at least 2 * size, resize it to `size` (BICUBIC), center-crop."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = tuple(round(side * scale) for side in image.size)
    if sides[0] * sides[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow to crop a square from them")
    image = image.resize(sides, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_crop(path: str | Path, size: int) -> np.ndarray:
    """Reads one image, converts it to RGB and crops it -> (size, size, 3) uint8.

    Applies the EXIF orientation, puts transparent pixels on white and scales 16-bit gray to 8 bits; the released code
    does none of these. Opens raster formats only. Raises a ValueError with the reason if the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transparent palettes, invalid EXIF data: the pixels are fine
            with Image.open(path, formats=FORMATS) as image:
                return np.array(center_crop(to_rgb(ImageOps.exif_transpose(image)), size))  # a copy: writable for torch
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds of errors on damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; ValueError for values whose white point is not known."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"gray values {values.min()} to {values.max()} are outside the range of a 16-bit image")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 -> 255, rounded
    if image.mode == "F":
        raise ValueError("floating-point values have no defined white level; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
