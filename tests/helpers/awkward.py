"""A folder of 300 images of every kind that people have, with the pixels that each must give.

Every image shows four quadrants of one color each, so a crop of its center to a square has them, too.
"""

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

SIZES = ((64, 64), (40, 36), (512, 100), (20, 400), (8, 8), (300, 200), (32, 32), (90, 700), (16, 12), (1000, 640))
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
         7: "TRANSVERSE", 8: "ROTATE_270"}  # what a camera did to an upright image, by EXIF orientation  # fmt: skip
AVIF = features.check("avif")
TURNED, WHITE, DEEP = "EXIF orientation applied", "transparency put on white", "16 bits scaled to 8"
FRAMES, GRAY = "first of several frames or pages", "grayscale"


@dataclass(frozen=True)
class Case:
    """A file's contents, the colors (2, 2, 3) that it must give up to `tolerance`, and how it is counted."""

    kind: str
    suffix: str
    data: bytes
    colors: np.ndarray
    tolerance: int = 1
    counted: tuple[str, ...] = ()
    size: tuple[int, int] = (64, 64)


def quadrants(colors: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(2, 2, C) -> an image (height, width, C) of four quadrants; even sides."""
    return colors.repeat(size[1] // 2, 0).repeat(size[0] // 2, 1)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def deep_png(array: np.ndarray, transparent: list[int] | None = None) -> bytes:
    """A PNG with 16 bits per channel, which Pillow writes in gray only: (height, width, 1 to 4 channels)."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    own = [(b"tRNS", np.array(transparent, ">u2").tobytes())] if transparent else []
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return png_of((b"IHDR", header), *own, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def plain(rng: np.random.Generator, size: tuple[int, int]) -> Iterator[Case]:
    """Opaque 8-bit images: every format."""
    colors = rng.integers(0, 256, (2, 2, 3), np.uint8)
    image = Image.fromarray(quadrants(colors, size))
    for suffix, format, tolerance, options in (
        ("png", "PNG", 1, {}), ("jpg", "JPEG", 8, {"quality": 95, "subsampling": 0}),
        ("JPEG", "JPEG", 8, {"quality": 95, "subsampling": 0, "progressive": True}),
        ("jfif", "JPEG", 8, {"quality": 95}), *[("avif", "AVIF", 12, {"quality": 95, "subsampling": "4:4:4"})] * AVIF,
        ("webp", "WEBP", 1, {"lossless": True}), ("WebP", "WEBP", 12, {"quality": 95}), ("bmp", "BMP", 1, {}),
        ("TIF", "TIFF", 1, {"compression": "tiff_lzw"}), ("tiff", "TIFF", 1, {}), ("ppm", "PPM", 1, {}),
        ("TGA", "TGA", 1, {}), ("png", "JPEG", 8, {"quality": 95, "subsampling": 0}),
    ):  # fmt: skip
        yield Case(format, suffix, saved(image, format, **options), colors, tolerance, (), size)
    yield Case("palette", "gif", saved(image.quantize(4), "GIF"), colors, 1, ("palette",), size)
    yield Case("palette", "PNG", saved(image.quantize(4), "PNG"), colors, 1, ("palette",), size)
    gray = colors[..., :1].repeat(3, -1)
    level = Image.fromarray(quadrants(colors[..., 0], size))
    yield Case("gray", "png", saved(level, "PNG"), gray, 1, (GRAY,), size)
    yield Case("gray", "jpg", saved(level, "JPEG", quality=95), gray, 6, (GRAY,), size)
    yield Case("gray", "pgm", saved(level, "PPM"), gray, 1, (GRAY,), size)
    bit = Image.fromarray(quadrants(colors[..., 0] > 127, size))
    yield Case("1 bit", "png", saved(bit, "PNG"), (gray > 127) * np.uint8(255), 1, (GRAY,), size)
    cmyk = image.convert("CMYK")
    yield Case("CMYK", "tif", saved(cmyk, "TIFF"), colors, 1, ("CMYK",), size)
    yield Case("CMYK", "jpg", saved(cmyk, "JPEG", quality=95, subsampling=0), colors, 8, ("CMYK",), size)


def turned(rng: np.random.Generator, size: tuple[int, int]) -> Iterator[Case]:
    """What cameras write: the image lies on its side, and EXIF data say how."""
    colors = rng.integers(0, 256, (2, 2, 3), np.uint8)
    image = Image.fromarray(quadrants(colors, size))
    for place, (value, turn) in enumerate(TURNS.items()):
        lying, suffix = image.transpose(Image.Transpose[turn]), ("jpg", "png", "webp", "tif")[place % 4]
        format = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
        data = saved(lying, format, exif=exif(value), **options)
        yield Case(f"EXIF {value}", suffix, data, colors, 8 if format == "JPEG" else 1, (TURNED,), size)
    broken = saved(image, "PNG", exif=b"Exif\0\0nonsense")
    yield Case("EXIF broken", "png", broken, colors, 1, (), size)
    yield Case("EXIF 1", "png", saved(image, "PNG", exif=exif(1)), colors, 1, (), size)


def deep(rng: np.random.Generator, size: tuple[int, int]) -> Iterator[Case]:
    """16 bits per channel: the value 257 v is v."""
    colors = rng.integers(0, 256, (2, 2, 3), np.uint8)
    gray, level = colors[..., :1].repeat(3, -1), quadrants(colors[..., 0], size).astype(np.uint16) * 257
    yield Case("16-bit", "png", saved(Image.fromarray(level), "PNG"), gray, 1, (DEEP, GRAY), size)
    yield Case("16-bit", "tif", saved(Image.fromarray(level), "TIFF"), gray, 1, (DEEP, GRAY), size)
    yield Case("32-bit", "tiff", saved(Image.fromarray(level.astype(np.int32)), "TIFF"), gray, 1, (DEEP, GRAY), size)
    many = quadrants(colors, size).astype(np.uint16) * 257
    yield Case("16-bit RGB", "png", deep_png(many), colors, 1, (DEEP,), size)


def transparent(rng: np.random.Generator, size: tuple[int, int]) -> Iterator[Case]:
    """Alpha: c becomes c a + 255 (1 - a)."""
    colors, alpha = rng.integers(0, 256, (2, 2, 3), np.uint8), np.array([[[0], [255]], [[128], [51]]], np.uint8)
    seen = np.round(colors * (alpha / 255) + 255 * (1 - alpha / 255)).astype(np.uint8)
    image = Image.fromarray(quadrants(np.concatenate([colors, alpha], -1), size))
    yield Case("RGBA", "png", saved(image, "PNG"), seen, 2, (WHITE,), size)
    yield Case("RGBA", "webp", saved(image, "WEBP", lossless=True, exact=True), seen, 2, (WHITE,), size)
    yield Case("RGBA", "tif", saved(image, "TIFF"), seen, 2, (WHITE,), size)
    level = Image.fromarray(quadrants(np.concatenate([colors[..., :1], alpha], -1), size))
    yield Case("LA", "png", saved(level, "PNG"), seen[..., :1].repeat(3, -1), 2, (WHITE, GRAY), size)
    one = np.array([[0, 1], [2, 3]], np.uint8)
    palette = Image.fromarray(quadrants(one, size), "P")
    palette.putpalette(colors.reshape(-1).tolist())
    holed = np.where(one[..., None] == 2, 255, colors).astype(np.uint8)
    yield Case("P with a hole", "png", saved(palette, "PNG", transparency=2), holed, 1, (WHITE, "palette"), size)
    yield Case("P with a hole", "gif", saved(palette, "GIF", transparency=2), holed, 1, (WHITE, "palette"), size)


def moving(rng: np.random.Generator, size: tuple[int, int]) -> Iterator[Case]:
    """Several frames or pages: the first one."""
    colors = rng.integers(0, 256, (3, 2, 2, 3), np.uint8)
    first, *others = (Image.fromarray(quadrants(each, size)) for each in colors)
    more = {"save_all": True, "append_images": others}
    yield Case("animated", "GIF", saved(first.quantize(4), "GIF", save_all=True,
               append_images=[o.quantize(4) for o in others]), colors[0], 1, (FRAMES, "palette"), size)  # fmt: skip
    yield Case("animated", "webp", saved(first, "WEBP", lossless=True, **more), colors[0], 1, (FRAMES,), size)
    yield Case("animated", "png", saved(first, "PNG", **more), colors[0], 1, (FRAMES,), size)
    yield Case("pages", "tif", saved(first, "TIFF", **more), colors[0], 1, (FRAMES,), size)
    yield Case("MPO", "jpg", saved(first, "MPO", quality=95, subsampling=0, **more), colors[0], 8, (), size)


KINDS: tuple[Callable, ...] = (plain, turned, deep, transparent, moving)
STRAY = {"notes.txt": b"hello", "photo.heic": b"ftypheic", "Thumbs.db": b"x", "no suffix": b"x", ".DS_Store": b"x",
         ".hidden.png": b"x", "scan.pdf": b"%PDF", "page.svg": b"<svg/>"}  # fmt: skip
CORRUPT = {"cut.png": 200, "empty.JPG": 0, "text.gif": None}
PLACES = ("birds", "Fußgänger/deep/er", "犬", "with space/UPPER")


def make(root: Path, count: int = 300, side: int = 32) -> tuple[dict[str, Case], Counter[str]]:
    """Writes `count` images and what lies around them; the readable ones by path, and how they must be counted."""
    rng, cases, counted = np.random.default_rng(0), {}, Counter()
    number = 0
    while len(cases) < count - len(CORRUPT):
        size = SIZES[number % len(SIZES)]
        for case in KINDS[number % len(KINDS)](rng, size):
            place = PLACES[len(cases) % len(PLACES)]
            name = ("Bild é", "a'b \"c\"", "x" * 80, "..dots..")[len(cases) // 4 % 4]
            path = f"{place}/{len(cases):03d} {name}.{case.suffix}"
            (root / place).mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(case.data)
            cases[path] = case
            counted.update(case.counted)
            counted["enlarged"] += min(case.size) < side
            if len(cases) == count - len(CORRUPT):
                break
        number += 1
    whole = saved(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), "PNG")
    for name, size in CORRUPT.items():
        (root / "birds" / name).write_bytes(b"hello" if size is None else whole[:size])
    for name, data in STRAY.items():
        (root / "犬" / name).write_bytes(data)
    os.mkfifo(root / "birds" / "pipe.png")
    (root / "birds" / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "birds" / "loop").symlink_to(root / "birds", target_is_directory=True)
    return cases, +counted
