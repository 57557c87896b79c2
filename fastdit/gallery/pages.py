"""Pictures of samples: `sheet` over any axes, `trajectory` from noise to data, `interpolation` of seeds or classes."""

import math
import sys
from itertools import pairwise, product

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastdit.distributed import Ranks
from fastdit.gallery import KEYS, OPTIONS
from fastdit.gallery.axes import Axes
from fastdit.gallery.cells import Cell, drawn, mix_classes, path_of
from fastdit.pipeline import ImagePipeline
from fastdit.registry import check
from fastdit.sheets import in_rows, labelled, stacked

ACROSS = 8  # images in a row where only one axis varies
FRAMES, STRIP, POINTS = 24, 12, 11  # times in a GIF and in a strip; columns of an interpolation


def sheet(axes: Axes, ranks: Ranks, rows: str | None = None, columns: str | None = None) -> Image.Image:
    """A labelled sheet of all combinations of values, on every process.

    `rows`, `columns`: names of axes; by default the first two that vary. One page for each combination of the others,
    below each other. If a single axis varies, its images fill rows of eight.
    """
    for option, axis in (("--rows", rows), ("--columns", columns)):
        if axis:
            check(axis, OPTIONS, option)
    if rows and rows == columns:
        raise ValueError(f"--rows={rows} and --columns={columns} are the same; choose another axis for one")
    left = [axis for axis in axes.varying if axis not in (rows, columns)]
    if not rows and (columns or len(left) > 1):
        rows = left.pop(0) if left else None
    if not columns:
        columns = left.pop(0) if left else None
    values = axes.values
    counts = [len(values[axis]) for axis in OPTIONS]
    images = None  # (class, seed, guidance, steps, sampler, checkpoint, H, W, 3)
    quiet = not ranks.is_main or not sys.stderr.isatty()
    for k, folder in enumerate(tqdm(values["checkpoint"], unit="checkpoint", disable=quiet or counts[-1] == 1)):
        for place, pipeline in zip(np.ndindex(*counts[2:5]), axes.variants(folder), strict=True):
            cells = [Cell(*pair) for pair in product(axes.labels(pipeline), values["seed"])]
            made = drawn(pipeline, cells, ranks)
            images = np.zeros((*counts, *made.shape[1:]), np.uint8) if images is None else images
            images[:, :, *place, k] = made.reshape(*counts[:2], *made.shape[1:])

    def at(**chosen: int) -> np.ndarray:
        return images[tuple(chosen.get(axis, 0) for axis in OPTIONS)]

    pages = []
    for panel in product(*(range(len(values[axis])) for axis in left)):
        fixed = dict(zip(left, panel, strict=True))
        said = ", ".join(axes.text(axis, values[axis][i]) for axis, i in fixed.items())
        title = "\n".join(filter(None, [axes.title() if not pages else "", said]))
        row_values, column_values = (values[axis] if axis else [None] for axis in (rows, columns))
        shown = [[at(**fixed, **{rows or "": r, columns or "": c}) for c in range(len(column_values))]
                 for r in range(len(row_values))]  # fmt: skip
        if not rows and columns and len(column_values) > ACROSS:
            captions = in_rows([axes.short(columns, value) for value in column_values], ACROSS)
            pages.append(labelled(in_rows(shown[0], ACROSS), title=title, columns_title=columns, captions=captions))
            continue
        row_labels = [axes.text(rows, value) for value in row_values] if rows else ()
        labels = [axes.short(columns, value) for value in column_values] if columns else ()
        pages.append(labelled(shown, title=title, row_labels=row_labels, columns_title=columns or "",
                              column_labels=labels))  # fmt: skip
    return stacked(pages)


def trajectory(axes: Axes, kind: str) -> list[Image.Image]:
    """x_t and the predicted x_0 from noise to data: the frames of a GIF, or, for `kind` png, a single strip.

    ValueError unless only classes and seeds vary, and the images fit in one batch.
    """
    if "seed" not in axes.given and "class" in axes.varying:
        axes = axes.narrowed(seed=axes.values["seed"][:1])
    pipeline, pairs = one_setting(axes, "--trajectory"), list(product(axes.values["class"], axes.values["seed"]))
    if len(pairs) > (size := pipeline.config.sampling.batch_size):
        raise ValueError(f"--trajectory shows up to sampling.batch_size={size} images, not {len(pairs)}; choose fewer")
    said = axes.short if kind == "gif" and len(axes.varying) == 1 else axes.text
    names = [", ".join(said(axis, value) for axis, value in zip(("class", "seed"), pair, strict=True)
                       if axis in axes.varying) for pair in pairs]  # fmt: skip
    times, images = path_of(pipeline, [Cell(*pair) for pair in pairs], STRIP if kind == "png" else FRAMES)
    if kind == "png":
        rows = images.swapaxes(0, 2).reshape(-1, len(times), *images.shape[3:])  # (n 2, F, H, W, 3)
        labels = [text for name in names for text in (f"{name} x_t".strip(), "predicted x_0")]
        return [labelled(rows, title=axes.title(), row_labels=labels, columns_title="t (1 is noise)",
                         column_labels=[f"{t:.2f}" for t in times])]  # fmt: skip
    across = math.ceil(len(pairs) ** 0.5)
    captions = in_rows(names, across) if any(names) else ()
    halves = [[labelled(in_rows(half, across), captions=captions) for half in pair] for pair in images]
    pages = [labelled([pair], columns_title=f"t = {t:.2f}", column_labels=["x_t", "predicted x_0"])
             for t, pair in zip(times, halves, strict=True)]  # fmt: skip
    return [page.crop((0, 0, *pages[0].size)) for page in pages]  # some digits may be wider than others


def interpolation(axes: Axes, ranks: Ranks, between: str, points: int = POINTS) -> Image.Image:
    """A row of `points` images from each seed, or class, to the next one, on every process; ends are the plain samples.

    Seeds: the noise is interpolated on a sphere (`MixedRandom`). Classes: the rows of the label table are interpolated
    linearly (`mix_classes`), which changes the network of `axes`.
    """
    axis, other = ("seed", "class") if between == "seeds" else ("class", "seed")
    if not 2 <= points <= 100:
        raise ValueError(f"--points={points} must be from 2 to 100")
    if between == "classes" and not axes.pipeline.config.data.num_classes:
        raise ValueError("--interpolate=classes: this network is unconditional; use seeds")
    first = axes.values["seed"][0]
    if axis not in axes.given:
        axes = axes.narrowed(**{axis: [first, first + 1, first + 2] if axis == "seed" else axes.values[axis][:4]})
    if other not in axes.given:
        axes = axes.narrowed(**{other: axes.values[other][:1]})
    values, others = axes.values[axis], axes.values[other]
    if len(values) < 2:
        raise ValueError(f"--interpolate={between} needs two {between} or more; give --{OPTIONS[axis]}")
    pipeline, pairs = one_setting(axes, "--interpolate"), list(pairwise(values))
    parts = np.linspace(0, 1, points).tolist()
    if axis == "seed":
        cells = [Cell(label, *pair, u) for label in others for pair in pairs for u in parts]
    else:
        labels = mix_classes(pipeline, [(*pair, u) for pair in pairs for u in parts])
        cells = [Cell(label, seed) for seed in others for label in labels]
    names = [f"{axes.text(axis, a)} to {axes.text(axis, b)}" for a, b in pairs]
    names = [f"{axes.text(other, value)}, {name}" if len(others) > 1 else name for value in others for name in names]
    return labelled(in_rows(drawn(pipeline, cells, ranks), points), title=axes.title(), row_labels=names,
                    column_labels=[f"{u:.2g}" for u in parts])  # fmt: skip


def one_setting(axes: Axes, option: str) -> ImagePipeline:
    """The only pipeline of a picture whose classes and seeds vary; ValueError where something else does."""
    for axis in (*KEYS, "checkpoint"):
        if axis in axes.varying:
            raise ValueError(f"{option} takes several classes and seeds only; give one value of --{OPTIONS[axis]}")
    return axes.variants(axes.values["checkpoint"][0])[0]
