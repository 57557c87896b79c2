"""The pictures of a run's samples: a grid for each step, and a strip that puts the steps below each other."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastdit.files import replacing
from fastdit.pipeline import spread
from fastdit.sheets import in_rows, tiled

GAP, GRAY = 2, 128  # pixels between images, and their value
ROWS, MARGIN = 12, 70  # steps in a strip, at most; pixels for their numbers
NAME = "step-{:07d}.png"


def sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 (N, H, W, 3) as rows of `columns` images, with GAP pixels between them: one picture (H', W', 3)."""
    return np.asarray(tiled(in_rows(images, columns), GAP))


def write_png(picture: np.ndarray, path: Path) -> None:
    with replacing(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def read_png(path: Path) -> np.ndarray | None:
    """uint8 (H, W, 3); None where the file is no RGB image in PNG format that can be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return np.asarray(image) if image.mode == "RGB" else None
    except Exception:  # of many kinds, as in data/images.py
        return None


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def sheets(folder: Path) -> list[Path]:
    """The grids in a folder by step."""
    return sorted((path for path in folder.glob("step-*.png") if path.stem[5:].isdecimal()), key=step_of)


def strip(folder: Path, height: int, row: int = 0) -> np.ndarray | None:
    """One row, of images of `height` pixels, of up to ROWS grids in the folder, each with its step; or None."""
    rows = [(step_of(path), picture) for path in sheets(folder) if (picture := read_png(path)) is not None]
    top = row * (height + GAP)
    rows = [(step, picture[top : top + height]) for step, picture in rows if picture.shape[1:] == rows[-1][1].shape[1:]]
    if not rows:
        return None
    kept = [rows[i] for i in spread(len(rows), ROWS)]
    whole = Image.new("RGB", (MARGIN + kept[0][1].shape[1], len(kept) * (height + GAP) - GAP), (GRAY,) * 3)
    pen = ImageDraw.Draw(whole)
    for i, (step, picture) in enumerate(kept):
        whole.paste(Image.fromarray(picture), (MARGIN, i * (height + GAP)))
        pen.text((4, i * (height + GAP) + height // 2 - 6), f"{step:,}", fill="white")
    return np.asarray(whole)
