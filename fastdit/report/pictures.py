"""Images as data URIs, sheets of images, animations, and plots as SVG."""

import base64
import html
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastdit.sheets import animated, fitted, in_rows, tiled

SIDE, ANIMATED_SIDE = 128, 64  # pixels of an image on the page, at most
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 52, 16, 10, 26  # of a plot; the inner margins hold its numbers
GAP = 1 / 16  # between images, of their width
POINTS = 300  # of a curve, at most


def sheet(images: np.ndarray, columns: int, side: int = SIDE) -> Image.Image:
    """uint8 (N, H, W, 3) as rows of `columns` images, none wider or higher than `side`; transparent between them."""
    small = [fitted(image, side) for image in images]
    return tiled(in_rows(small, columns), round(GAP * small[0].width), None)


def picture(images: np.ndarray, columns: int, alt: str, side: int = SIDE) -> str:
    """An <img> with a `sheet` of uint8 (N, H, W, 3) in it."""
    small = images.shape[2] <= ANIMATED_SIDE
    return _img(sheet(images, columns, side), alt, small, "webp", lossless=small, quality=90, method=4)


def png(image: np.ndarray, alt: str) -> str:
    """An <img> with one picture, uint8 (H, W, 3)."""
    return _img(Image.fromarray(image), alt, image.shape[0] <= 16 * ANIMATED_SIDE, "png")


def animation(frames: np.ndarray, columns: int, alt: str, frame_ms: int = 150) -> str:
    """An <img> with a GIF of frames uint8 (F, N, H, W, 3), each of them a sheet; the last one is held."""
    pages = [sheet(frame, columns, ANIMATED_SIDE) for frame in frames]
    return _img(pages[0], alt, frames.shape[3] <= ANIMATED_SIDE, "gif", **animated(pages, frame_ms))


def _img(image: Image.Image, alt: str, pixels: bool, kind: str, **options) -> str:
    """pixels: show them as squares where the picture is enlarged."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"' + ' class="pixels"' * pixels
    return f'<img src="data:image/{kind};base64,{data}" {size} alt="{html.escape(alt)}">'


@dataclass(frozen=True)
class Series:
    """A curve: points (n,), nan where it is interrupted; `color` is the number of the run; bands: +- an error (n,)."""

    x: np.ndarray
    y: np.ndarray
    color: int = 0
    faint: bool = False
    dashed: bool = False
    error: np.ndarray | None = None


def smoothed(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """The mean (n,) over a window of `share` of the points around each, without the nans in it."""
    half = int(share * len(values) / 2)
    good = ~np.isnan(values)
    sums, counts = (np.concatenate([[0], np.cumsum(v)]) for v in (np.where(good, values, 0), good))
    places = np.arange(len(values))
    low, high = (places - half).clip(0), (places + half + 1).clip(max=len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of the points (n,), the last one among them."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(POINTS, len(x))).round().astype(int))
    return x[kept], y[kept]


def plot(title: str, series: list[Series], *, log: bool = False, x_label: str = "step", zero: bool = False) -> str:
    """A <figure> with the curves as SVG, "" where there is no point. log: of y; zero: y begins at 0.

    Colors are classes (s0, s1, ...), so that the page chooses them for light and dark.
    """
    good = [s for s in series if np.isfinite(s.y).any()]
    ys = np.concatenate([s.y + e for s in good for e in ((0,) if s.error is None else (-s.error, s.error))] or [[]])
    ys = ys[np.isfinite(ys) & (ys > 0)] if log else ys[np.isfinite(ys)]
    if not len(ys):
        return ""
    xs = np.concatenate([s.x for s in good])
    low, high = float(min(ys.min(), 0) if zero else ys.min()), float(ys.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    low, high = (low / 1.05, high * 1.05) if log else (low if zero and not low else low - margin, high + margin)
    left, right = float(xs.min()), float(xs.max())
    left, right = (left, right) if right > left else (left - 1, right + 1)
    rise = np.log if log else np.asarray

    def place(x, y) -> np.ndarray:
        across = LEFT + (np.asarray(x) - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        up = (rise(y) - rise(low)) / (rise(high) - rise(low))
        return np.stack(np.broadcast_arrays(across, HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)), -1)  # (n, 2)

    parts = []
    for value in ticks(low, high, log):
        y = place(left, value)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')  # fmt: skip
    for value in ticks(left, right, count=4):
        x = place(value, high)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>')
    for s in good:
        for part in np.split(np.arange(len(s.x)), np.flatnonzero(~np.isfinite(s.y) | (log & (s.y <= 0)))):
            part = part[np.isfinite(s.y[part]) & ((s.y[part] > 0) | (not log))]
            if not len(part):
                continue
            if s.error is not None:
                edges = [place(s.x[part], s.y[part] + s.error[part]), place(s.x[part], s.y[part] - s.error[part])[::-1]]
                parts.append(f'<path class="band s{s.color}" d="{line(np.concatenate(edges))}Z"/>')
            points = place(*thinned(s.x[part], s.y[part]))
            parts.append(f'<path class="s{s.color}{" faint" * s.faint}{" dashed" * s.dashed}" d="{line(points)}"/>')
    name, box = html.escape(title), f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    return (f'<figure class="plot"><figcaption>{name} <span>over {html.escape(x_label)}</span></figcaption>'
            f'<svg {box} aria-label="{name}">{"".join(parts)}</svg></figure>')  # fmt: skip


def line(points: np.ndarray) -> str:
    """An SVG path through (n, 2); a single point becomes a dot."""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f"M{steps}" + "h.01" * (len(points) == 1)


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers in [low, high]: about `count`, or for log the decades and 2 and 5 between them."""
    if log and high / low > 5:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1,)):
            found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
            if len(found) <= 7:
                return found
        return found[:: math.ceil(len(found) / 7)]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """0.25, 5e-5, 20k, 1.5M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    if 0 < abs(value) < 1e-4:
        return f"{value:.2e}".replace(".00e", "e").replace("0e", "e").replace("e-0", "e-")
    return f"{value:.4g}"
