"""Image files to pixels in [-1, 1]. Center crop as in ADM (Dhariwal & Nichol 2021)."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

EXTENSIONS = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga",
              ".tif", ".tiff", ".webp")  # fmt: skip
# the only decoders that a file may start, whatever its name is: Pillow would also run Ghostscript on PostScript
Image.init()
FORMATS = tuple({"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"} & Image.OPEN.keys())

TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE",
                        "ROTATE_90"), start=2))  # EXIF's orientation -> what undoes it  # fmt: skip
HANDLED = "EXIF orientation applied", "transparency put on white", "16 bits scaled to 8"
EXACT = "EXIF orientation not applied", "transparency dropped", "16 bits as Pillow converts them"  # with adm_exact
Size = int | tuple[int, int]  # pixels: the side of a square, or (width, height)
Opened = str | Path | BinaryIO | Image.Image
Crop = Callable[[Image.Image, Size], Image.Image]


def width_height(size: Size) -> tuple[int, int]:
    """(width, height) of a size."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: Size) -> str:
    """`256` or `512x256`, as `parse_size` reads it."""
    return "x".join(map(str, [size] if isinstance(size, int) else size))


def parse_size(text: str | Size) -> Size:
    """`256` -> 256; `512x256` (width x height) -> (512, 256), or 512 if both are equal; ValueError otherwise."""
    try:
        sides = [int(side) for side in str(text).lower().split("x")] if isinstance(text, int | str) else [*text]
        if len(sides) > 2 or min(sides) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"image_size={text} is not a size; give a side such as 256, or WIDTHxHEIGHT") from None
    return sides[0] if sides[0] == sides[-1] else tuple(sides)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """ADM's crop: halve (BOX) while no side falls below `size`, resize to cover it (BICUBIC), center-crop."""
    wanted, image = width_height(size), covering(image, size)
    left, top = (image.width - wanted[0]) // 2, (image.height - wanted[1]) // 2
    return image.crop((left, top, left + wanted[0], top + wanted[1]))


def random_crop(image: Image.Image, size: Size, draws: Sequence[float], least: float = 1.0) -> Image.Image:
    """A crop at any place, of `least` to 1 of the largest one's sides, scaled to `size` as by `center_crop`.

    `draws`: three numbers in [0, 1), for the share of the sides and the places in x and y. With least=1, the shorter
    side is resized to `size`, as for latent diffusion's autoencoders; ADM has 0.8. A share never makes a crop of fewer
    pixels than `size`, so that only images smaller than that are enlarged.
    """
    wanted = width_height(size)
    whole = max(side / own for side, own in zip(wanted, image.size, strict=True))  # at this share nothing is resized
    low = min(1.0, max(least, whole))
    image = covering(image, size, low + draws[0] * (1 - low))
    left, top = (int(u * (own - side + 1)) for u, own, side in zip(draws[1:], image.size, wanted, strict=True))
    return image.crop((left, top, left + wanted[0], top + wanted[1]))


def covering(image: Image.Image, size: Size, share: float = 1.0) -> Image.Image:
    """The image, resized such that `size` is `share` of the largest crop of this form."""
    wanted = width_height(size)
    while all(side * share >= 2 * least for side, least in zip(image.size, wanted, strict=True)):
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = max(least / side for side, least in zip(image.size, wanted, strict=True)) / share
    sides = tuple(max(least, round(side * scale)) for side, least in zip(image.size, wanted, strict=True))
    if sides[0] * sides[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow to crop from them")
    return image.resize(sides, resample=Image.Resampling.BICUBIC)


def load_crop(opened: Opened, size: Size, adm_exact: bool = False, crop: Crop = center_crop) -> np.ndarray:
    """Reads one image, converts it to RGB and crops it -> (height, width, 3) uint8; see `read_image`."""
    return read_image(opened, size, adm_exact, crop)[0]


def read_image(
    opened: Opened, size: Size | None, adm_exact: bool = False, crop: Crop = center_crop
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The crop (height, width, 3) uint8 of an image, and what was done to it.

    `opened`: a path, a binary file or an image. Without a size, nothing is cropped. Takes the first frame, applies the
    EXIF orientation, puts transparent pixels on white and scales 16-bit values to 8 bits. `adm_exact` does none of
    this, as ADM's and DiT's own code.
    Opens raster formats only. Raises a ValueError with the reason if the image cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transparent palettes, invalid EXIF data: the pixels are fine
            decoded = isinstance(opened, Image.Image)
            with opened if decoded else Image.open(opened, formats=FORMATS) as image:
                if not adm_exact and image.mode == "RGB" and is_deep(image) and "transparency" in image.info:
                    raise ValueError("its transparent color has 16 bits; save it with 8 bits or an alpha channel")
                levels, done = gray_levels(image), treatments(image, size, adm_exact)
                image.load()
                rgb = image.convert("RGB") if adm_exact else to_rgb(upright(image), levels)
                return np.array(crop(rgb, size) if size else rgb), done  # a copy: writable for torch
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds of errors on damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 2 to 8, or 1 if it is normal, unknown or unreadable."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data, with any error; the pixels are fine
        return 1
    return value if value in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as its EXIF data say that it is seen. Pillow has done this already to a TIFF."""
    turn = TURNS.get(orientation(image))
    return image.transpose(Image.Transpose[turn]) if turn else image


def treatments(image: Image.Image, size: Size | None, adm_exact: bool = False) -> tuple[str, ...]:
    """What the conversion of an image that is not yet decoded means for it, in words for the summary."""
    width, height = image.size
    deep = is_deep(image)
    turned = orientation(image) != 1
    if orientation(image) > 4 and not adm_exact and image.format != "TIFF":  # a TIFF's size is that of the turned image
        width, height = height, width
    wanted = width_height(size or 1)
    found = {
        **dict(zip(EXACT if adm_exact else HANDLED, (turned, image.has_transparency_data, deep), strict=True)),
        "palette": image.mode in ("P", "PA"),
        "CMYK": image.mode == "CMYK",
        "grayscale": image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I"),
        # an MPO is a photo with a preview, or with depth, behind it
        "first of several frames or pages": getattr(image, "is_animated", False) and image.format != "MPO",
        "enlarged": width < wanted[0] or height < wanted[1],
    }
    return tuple(name for name, holds in found.items() if holds)


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not yet decoded has more than 8 bits per value."""
    return image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def gray_levels(image: Image.Image) -> tuple[int, int]:
    """Black and white of gray values with more than 8 bits: 0 and 65535 but in some TIFF files, as Pillow reads them.

    Of those with 12 bits, white is 4095; with PhotometricInterpretation 0, black and white are exchanged.
    """
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(258) == (12,) else 65535
    return (white, 0) if tags.get(262) == 0 else (0, white)


def to_rgb(image: Image.Image, levels: tuple[int, int] = (0, 65535)) -> Image.Image:
    """8-bit RGB of any mode, with the `gray_levels` of the file; ValueError for values whose white is not known."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values, most = np.asarray(image), max(levels)
        if values.min() < 0 or values.max() > most:
            found, bits = f"{values.min()} to {values.max()}", most.bit_length()
            raise ValueError(f"gray values {found} are outside the range of a {bits}-bit image")
        light = np.linspace(*levels, most + 1) * (255 / most)  # of each value
        table = np.floor(light + 0.5).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            table[transparent] = 255
        return Image.fromarray(table[values]).convert("RGB")
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


class Unusable(ValueError):
    """The images cannot be extracted as they are: the same command would fail again."""


def skip_line(path: str, reason: str) -> str:
    """A line of skipped.txt: path, tab, reason. Control characters in a file's name are written as \\n, \\t, ..."""
    name = "".join(repr(c)[1:-1] if ord(c) < 32 else c for c in path)
    return f"{name}\t{' '.join(reason.split())}"


class Skipped:
    """Records the images that could not be read, and stops the run if there are too many.

    At most 1% of `total` may be skipped, or one image if that is more.
    """

    def __init__(self, total: int):
        self.total, self.allowed = total, max(1, total // 100)
        self.lines: list[str] = []  # path, tab, reason

    def add(self, path: str, reason: str) -> None:
        """Records an unreadable image; raises Unusable if there are now too many."""
        self.lines.append(skip_line(path, reason))
        if len(self.lines) > self.allowed:
            raise Unusable(
                f"more than {self.allowed} of {self.total} images cannot be read (the last is {path}: {reason}); "
                "repair or remove them"
            )
