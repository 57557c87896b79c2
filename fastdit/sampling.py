"""Sample images from a checkpoint: PNG files, an npz for evaluators and a grid, identical for any number of processes.

The label, the noise and the file name of image i depend only on i and the seed. Images are sampled in fixed batches,
batch b by process b mod world, and a short last batch is padded, because the last bits of a matrix product depend on
its shape. Files are written atomically, so the same command continues where a killed one stopped.
"""

import json
import sys
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastdit import distributed
from fastdit.build import check_sampling
from fastdit.config import check_used, leaves
from fastdit.diffusion.objectives import OF_LOSS
from fastdit.errors import make_folder
from fastdit.files import SAMPLING, read_json, replace_text, replacing
from fastdit.lock import FolderLock
from fastdit.pipeline import ImagePipeline
from fastdit.sheets import save, tiled
from fastdit.training import checkpoint
from fastdit.training.pipeline import image_pipeline
from fastdit.training.sheets import write_png
from fastdit.training.state import load_network

USED = ("sampling", "objective", "data.vae", "model.attention", "model.learn_sigma")  # keys that change samples
ROUTES = ("training.route", "training.route_ends")  # and with sampling.route


def check_settings(overrides: Iterable[str], options: Mapping[str, str] | None = None, but: Iterable[str] = ()) -> None:
    """ValueError for an override that does not change samples; `options` and `but`: as for `check_used`."""
    routes = ROUTES if any(override.startswith("sampling.route=") for override in overrides) else ()
    of_loss = [f"objective.{option}" for option in OF_LOSS]
    check_used(overrides, (*USED, *routes), "when sampling", options, (*of_loss, *but))


def load_pipeline(path: str | Path, overrides=(), *, weights: str = "ema", device="cpu") -> ImagePipeline:
    """The checkpoint at `path` (a run folder means its newest), its config changed by `overrides`.

    ValueError where the autoencoder, or the weak checkpoint, is not for the same latents.
    """
    overrides = list(overrides)
    check_settings(overrides, {"seed": "--seed"})
    trained = load_network(path, weights, overrides=overrides, device=device)
    config = trained.config
    check_sampling(config, trained.objective, trained.model.null_label)
    trained.warn()
    stated = any(override.startswith("data.vae=") for override in overrides)
    return image_pipeline(
        config, trained.model, trained.objective, trained.latents, trained.folder,
        run_dir=None if stated else checkpoint.run_of(trained.folder), weights=weights, identity=trained.identity,
        classes=trained.classes, checkpoint=str(trained.folder.resolve()),
    )  # fmt: skip


def sample(
    path: str | Path,
    out: str | Path,
    num_samples: int,
    *,
    overrides=(),
    seed: int = 0,
    labels: str | None = None,
    weights: str = "ema",
    device: str | None = None,
) -> Path:
    """Write `num_samples` images into `out` and return `out`; a second call with the same settings continues.

    `labels`: "balanced" (the trained classes in turn; default), "random" (drawn from the seed), or classes like
    "207,360", taken in turn. ValueError if `out` holds anything but a part of the same samples.
    """
    ranks = distributed.init(device)
    if num_samples < 1:
        raise ValueError(f"--num-samples={num_samples} must be 1 or more")
    pipeline = load_pipeline(path, overrides, weights=weights, device=ranks.device)
    config, out = pipeline.config, Path(out)
    classes, record = pipeline.classes.labels(labels, num_samples, seed), pipeline.record(num_samples, seed, labels)
    ranks.agree(dict(leaves(record)))  # not where a run that trains meanwhile wrote a checkpoint
    with FolderLock(out, "--out") if ranks.is_main else nullcontext():
        if ranks.is_main:
            for line in pipeline.remarks():
                print(f"warning: {line}", file=sys.stderr)
            _claim(out, record)
        ranks.barrier()

        batch = config.sampling.batch_size
        own = range(ranks.rank, pipeline.batches(num_samples), ranks.world)
        for b in tqdm(own, unit="batch", disable=not ranks.is_main or not sys.stderr.isatty()):
            wanted = range(b * batch, min((b + 1) * batch, num_samples))
            if all(_png(out, i).is_file() for i in wanted):
                continue
            for i, image in zip(wanted, pipeline.batch(b, classes, seed), strict=True):
                write_png(image, _png(out, i))
        ranks.barrier()
        if ranks.is_main:
            write_npz([_png(out, i) for i in range(num_samples)], out / "samples.npz")
            save([grid(out, classes)], out / "grid.png")
        ranks.barrier()
    return out


def write_npz(paths: list[Path], out: Path) -> None:
    """Stack PNG files as `arr_0`, uint8 (N, H, W, 3), with one image in memory at a time."""
    with _open_png(paths[0]) as first:
        shape = (len(paths), first.height, first.width, 3)
    with (
        replacing(out) as zipped,
        zipfile.ZipFile(zipped, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for path in paths:
            with _open_png(path) as image:
                if image.size != first.size:
                    raise ValueError(f"{path} is not of the same size as {paths[0]}; remove it to sample it again")
                file.write(np.asarray(image).tobytes())


def grid(out: Path, labels: list[int], rows: int = 10, columns: int = 10, gap: int = 2) -> Image.Image:
    """The first images of `out` in order of class, up to `rows` x `columns`, with `gap` pixels between them.

    Each class has a row, or several where there are fewer classes than rows. Of more classes than rows, the first ones
    are shown; they share rows if they have few images each.
    """
    by_class: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        by_class.setdefault(label, []).append(i)
    most = min(columns, max(map(len, by_class.values())))
    across = columns // most if len(by_class) > rows else 1  # classes in a row
    parts = sorted((start, label) for label, own in by_class.items() for start in range(0, len(own), columns))
    chosen = sorted((label, start) for start, label in parts[: rows * across])
    shown = [by_class[label][start : start + columns] for label, start in chosen]
    order = [sum(shown[i : i + across], []) for i in range(0, len(shown), across)]
    return tiled([[_open_png(_png(out, i)) for i in row] for row in order], gap)


def _claim(out: Path, settings: dict) -> None:
    """Create `out`, or check that it was started with the same settings."""
    path = out / SAMPLING
    if path.is_file():
        before = read_json(path)
        for key, value in settings.items():
            if key not in before:
                raise ValueError(f"{path} is damaged: it has no {key!r}; choose another --out")
            if key != "vae" and before[key] != value:  # a name
                old, new = (dict(leaves({key: settings})) for settings in (before[key], value))
                name = next((name for name in old | new if old.get(name) != new.get(name)), key)
                raise ValueError(f"--out {out} holds samples with {name}={old.get(name)!r}, not {new.get(name)!r}; "
                                 "choose another --out")  # fmt: skip
    elif any(file.name != "lock" for file in out.iterdir()):
        raise ValueError(f"--out {out} is not empty and holds no {SAMPLING}; choose another --out")
    else:
        make_folder(out / "images", "--out")
        replace_text(path, json.dumps(settings, indent=1))


def _png(out: Path, index: int) -> Path:
    return out / "images" / f"{index:06d}.png"


def _open_png(path: Path) -> Image.Image:
    """The RGB image in a PNG file; ValueError that names the file. Other formats are not tried: some start programs."""
    try:
        image = Image.open(path, formats=["PNG"])
        image.load()
    except Exception as error:  # of many kinds, as in data/images.py
        raise ValueError(f"{path} is not a PNG image that can be read; remove it to sample it again") from error
    if image.mode != "RGB":
        raise ValueError(f"{path} is a PNG image in mode {image.mode}, not RGB; remove it to sample it again")
    return image
