"""A sheet of the images in any folder, archive or npz file."""

from itertools import islice
from pathlib import Path

from PIL import Image

from fastdit.data.archives import is_there, open_images
from fastdit.data.images import read_image
from fastdit.data.manifest import is_shards
from fastdit.evaluation.images import is_run, open_set
from fastdit.files import SAMPLING
from fastdit.sheets import fitted, in_letters, in_rows, labelled, tiled


def folder_grid(
    path: str | Path, rows: int = 10, columns: int = 10, *, labels: bool | None = None, side: int = 256
) -> Image.Image:
    """The first images at `path`: what `open_images` takes, a folder of `fastdit sample`, latents, an npz.

    Images with classes, such as subfolders, have a labelled row for each class; `labels=False` shows them in order.
    Larger ones are scaled down to `side` pixels in width and height, others are shown pixel by pixel. ValueError for
    what cannot be read, and for `labels=True` without classes.
    """
    path = Path(path)
    for name, value in (("rows", rows), ("columns", columns), ("size", side)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be 1 or more")
    if not is_there(path):
        raise ValueError(f"FOLDER={path} does not exist; give a folder of images or an .npz file")
    if path.suffix == ".npz" or is_run(path) or is_shards(path):
        if labels:
            raise ValueError(f"--labels: {path} has no classes; leave it out")
        found = open_set(path, "FOLDER")
        images = (image for block in found.blocks(range(-(-found.count // 32))) for image in block)
        return tiled(in_rows([fitted(image, side) for image in islice(images, rows * columns)], columns))
    try:
        source = open_images(path / "images" if (path / SAMPLING).is_file() else path)
    except ValueError as error:
        raise ValueError(str(error).replace("images=", "FOLDER=", 1)) from None
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(source.labels):
        by_class.setdefault(label, []).append(i)
    if labels and not source.class_names:
        raise ValueError(f"--labels: {path} has no classes, such as subfolders; leave it out")
    if labels is False or len(by_class) == 1 and not labels:
        chosen, names = in_rows(range(min(len(source), rows * columns)), columns), ()
    else:
        kept = sorted(by_class)[:rows]
        chosen = [by_class[label][:columns] for label in kept]
        names = [in_letters(source.class_names[label], f"class {label}") for label in kept]

    def read(i: int) -> Image.Image:
        try:
            return fitted(read_image(source.open(i), None)[0], side)
        except (ValueError, OSError) as error:
            reason = f"{source.paths[i]} cannot be read ({error}); repair or remove it"
            raise ValueError(f"FOLDER={path}: {reason}") from None

    images = [[read(i) for i in row] for row in chosen]
    if not names and len({image.size for row in images for image in row}) == 1:
        return tiled(images)
    return labelled(images, row_labels=names)
