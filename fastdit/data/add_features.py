"""Extract an encoder's features of the images whose latents exist, into <latents>/features (see features.py)."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastdit.data.encode import encode_both, extract_share
from fastdit.data.features import (
    FOLDER,
    Encoder,
    FeatureManifest,
    FeatureWriter,
    grid_for,
    publish_features,
    record_type,
)
from fastdit.data.images import EXACT, HANDLED, Size, load_crop, size_text
from fastdit.data.jobs import write_folder
from fastdit.data.latents import LatentCodec
from fastdit.data.loader import read_moments
from fastdit.data.manifest import Manifest
from fastdit.data.progress import Progress
from fastdit.data.sources import ImageSource
from fastdit.data.writer import TAR_OVERHEAD
from fastdit.distributed import Ranks
from fastdit.errors import counted

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPARED, DIFFERENCE = 8, 0.1  # images whose latents are compared; how much they may differ, relative to their size


def add_features(
    source: ImageSource,
    latents: Manifest,
    encoder: Encoder,
    dtype: str,
    precision: str,
    ranks: Ranks,
    batch_size: int,
    workers: int,
    adm_exact: bool,
    say: Callable[[str], None],
) -> None:
    """Writes <latents>/features: the encoder's features of the images in `source` and of their mirror images.

    Shard i has the images of the latents' shard i, in their order. An interrupted run continues, with the same bytes.
    """
    out, index = latents.folder.resolve() / FOLDER, latents.index()
    if out.exists():
        raise ValueError(f"{out} exists; remove it to extract features again, or move it and name it in data.features")
    grid = grid_for(latents.latents.shape)
    about = FeatureManifest(
        encoder.name, encoder.weights, grid, encoder.dim, encoder.class_token, dtype=dtype, precision=precision,
        listing=latents.listing,
    )  # fmt: skip
    settings = {
        "images": source.identity,
        "latents": latents.index_sha256,
        **about.facts(),
        **dict(feature_dtype=dtype, precision=precision, adm_exact=adm_exact, batch_size=batch_size),
        "device": ranks.device.type,
    }
    ready, size, start = encoder.at(grid, precision), latents.latents.image_size, 0.0

    def before(share: float) -> None:
        check_space(out, int(share * len(latents) * feature_bytes(encoder, latents, dtype)))
        say(f"features: {encoder.name}, {grid[0]} x {grid[1]} patches of {encoder.dim} values, {dtype}")

    def write(progress: Progress, own: list[int]) -> None:
        nonlocal start
        start = time.perf_counter()
        shards = {number: index["key"][index["shard"] == number].tolist() for number in own}
        writer = partial(FeatureWriter, dtype=dtype)
        extract_share(source, progress, shards, ready, writer, ranks, size, batch_size, workers, adm_exact, skip=False)

    def complete(folder: Path, parts: list[dict], written: set[int]) -> None:
        publish_features(folder, out, about, parts)
        rate = np.isin(index["shard"], [*written]).sum() / (time.perf_counter() - start)
        found = f"{counted(len(latents), 'image')} in {counted(len(parts), 'shard')}"
        say(f"{out}: features of {found}, {rate:.1f} images/s")

    write_folder(
        out, len(latents.shards), settings, ranks, batch_size, say, before=before, write=write, publish=complete
    )


def check_stored(latents: Manifest, dtype: str | None, shard_size: int | None) -> None:
    """Raises a ValueError if the latents are stored with another dtype or shard size (None: not checked)."""
    place = f"the latents in {latents.folder}"
    remedy = "omit it to add features to them, or give --overwrite to extract both again"
    if dtype not in (None, latents.dtype):
        raise ValueError(f"dtype={dtype}, but {place} are stored as {latents.dtype}; {remedy}")
    if shard_size and -(-latents.images // shard_size) != len(latents.shards):
        raise ValueError(f"shard_size={shard_size}, but {place} are {counted(latents.images, 'image')} in "
                         f"{counted(len(latents.shards), 'shard')}; {remedy}")  # fmt: skip


def check_same_images(
    source: ImageSource, latents: Manifest, codec: LatentCodec, image_size: Size, adm_exact: bool
) -> None:
    """Raises a ValueError if the latents are not those of the images in `source`, as far as eight of them show."""
    where = f"the latents in {latents.folder}"
    if image_size != latents.latents.image_size:
        stored = size_text(latents.latents.image_size)
        raise ValueError(f"image_size={size_text(image_size)}, but {where} are from {stored} px images; use {stored}")
    latents.check(codec=codec)
    index, remedy = latents.index(), "give their images, or write to another --out"
    check_listed(source, latents, remedy)
    if other := next((what for what in (HANDLED if adm_exact else EXACT) if what in latents.counts), None):
        raise ValueError(f"{where} were extracted {'without' if adm_exact else 'with'} --adm-exact ({other}); do the "
                         "same for the features")  # fmt: skip
    rows = index[np.linspace(0, len(index) - 1, COMPARED).astype(int)]
    device = next((parameter.device for parameter in codec.vae.parameters()), torch.device("cpu"))  # Pixels has none
    kept = read_moments(latents, rows)
    if len(kept) < len(rows):
        raise ValueError(f"{where} are damaged; see fastdit verify {latents.folder}")
    for row, stored in zip(rows, kept, strict=True):
        key = int(row["key"])
        try:
            crop = load_crop(source.open(key), image_size, adm_exact)
        except (ValueError, OSError) as error:
            raise ValueError(f"{source.paths[key]} has a latent, but cannot be read now: {error}; restore it") from None
        found = encode_both(codec, [crop], 1, device)[0, 0].cpu()
        mean, expected = found.chunk(2)[0], stored.chunk(2)[0]
        if (mean - expected).norm() > DIFFERENCE * expected.norm():
            raise ValueError(f"the latent of {source.paths[key]} in {latents.folder} is of another image; {remedy}")


def check_listed(source: ImageSource, latents: Manifest, remedy: str) -> None:
    """ValueError if the latents are not of as many images as are in `source`, with the same classes and labels."""
    where = f"the latents in {latents.folder}"
    if len(source) != latents.images or source.class_names != latents.class_names:
        pairs = zip(source.class_names, latents.class_names, strict=False)
        named = next((f", such as {own!r} in place of {other!r}" for own, other in pairs if own != other), "")
        raise ValueError(
            f"{where} are of {counted(latents.images, 'image')} of "
            f"{counted(latents.num_classes, 'class', 'classes')}, but images={source.root} has "
            f"{len(source)} of {len(source.class_names)}{named}; {remedy}"
        )
    index, labels = latents.index(), np.array(source.labels)
    keys = index["key"].astype(np.int64)
    if keys.max() >= len(labels) or (labels[keys] != index["label"]).any():
        raise ValueError(f"{where} have other labels than images={source.root}; {remedy}")


def feature_bytes(encoder: Encoder, latents: Manifest, dtype: str) -> int:
    """Bytes per image on disk."""
    height, width = grid_for(latents.latents.shape)
    return 2 * record_type(dtype, height * width + encoder.class_token, encoder.dim).itemsize + TAR_OVERHEAD


def check_space(out: Path, size: int) -> None:
    """Raises a ValueError if the disk of `out` has less than `size` bytes free."""
    parent = next(folder for folder in out.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ValueError(
            f"out={out} needs about {size / 2**30:.2f} GiB, but {parent} has {free / 2**30:.2f} GiB free; "
            "free some or write elsewhere"
        )
